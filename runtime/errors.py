"""What a user reads when something is wrong: one sentence and an exit status, no traceback."""

import contextlib
import errno
import os
import signal
import sys

# A script imports this module first: Ctrl-C while torch is imported, which takes seconds, ends it without a traceback.
if "torch" not in sys.modules and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR)


class UserError(ValueError):
    """A wrong flag, file, checkpoint or data set: one sentence that names it, what was found and what to do."""


@contextlib.contextmanager
def one_sentence(name):
    """End the program with one line on stderr for a UserError, a full disk, a place without permission, or Ctrl-C."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 2
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
        return
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        message, status = "interrupted; the same command goes on from what is finished", 130  # as in shells
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        message = (f"cannot write {error.filename or ''}: {error.strerror}; make room or choose another folder, then "
                   "run the same command again")
    print(" ".join(f"{name}: {message}".split()), file=sys.stderr)
    sys.exit(status)
