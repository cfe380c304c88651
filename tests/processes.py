"""Scripts run in processes of a fork server: real processes that can be killed, without paying for imports again.

The server imports the libraries and runs nothing, so that what it forks has no threads of autograd or CUDA.
"""

import contextlib
import multiprocessing
import os
import pathlib
import runpy
import signal
import socket
import sys
import time
import traceback

from absl import flags

ROOT = pathlib.Path(__file__).parent.parent
HANGING = 1800  # seconds after which a process of seconds, on a machine a hundred times too busy, counts as hanging

os.environ["PYTHONPATH"] = str(ROOT)  # of the server, which does not get sys.path
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch.optim", "torchvision", "ml_collections", "absl.flags", "scipy.linalg",
                               "matplotlib.figure", "PIL.Image", "torch.utils.tensorboard",
                               "sklearn.datasets", "train", "generate_data", "evaluation_fid", "image_sampling",
                               "tests.processes"])


def _run(script, arguments, log, cwd, environment, prepare):
    """Run a script, or a module of tools/, as `python` would, output in the file `log` (the body of the child)."""
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, str(ROOT))
    os.chdir(cwd)
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.argv = [script, *arguments]
    for module, found in flags.FLAGS.flags_by_module_dict().items():  # those of scripts that tests imported
        if not module.startswith("absl."):
            for flag in list(found):
                delattr(flags.FLAGS, flag.name)
    status = 1
    try:
        if prepare is not None:
            prepare()
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:  # what a script would print before it ends
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Script:
    """A script in a process of its own; `log` is what it printed. `prepare`, if given, is called there first."""

    def __init__(self, folder, script, arguments, environment=None, cwd=ROOT, prepare=None):
        self._log = pathlib.Path(folder) / f"output-{pathlib.Path(script).stem}-{time.monotonic_ns()}.txt"
        environment = {**os.environ, **(environment or {})}
        self.process = SERVER.Process(target=_run, args=(
            script, [str(argument) for argument in arguments], str(self._log), cwd, environment, prepare))
        self.process.start()

    @property
    def log(self):
        """What the script has printed so far."""
        return self._log.read_text() if self._log.exists() else ""

    def wait(self, timeout=HANGING):
        """Wait for the end; return the exit status (negative: the signal that ended it)."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.kill()
            raise TimeoutError(f"the script did not end within {timeout} s; it printed: {self.log}")
        return self.process.exitcode

    def send(self, number):
        """Send a signal."""
        os.kill(self.process.pid, number)

    def kill(self):
        """End the process as kill -9 does."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def kill_when(self, condition, timeout=HANGING):
        """Kill -9 as soon as `condition()` holds; fail if the script ends before."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.is_alive(), f"the script ended before it could be killed: {self.log}"
            assert time.monotonic() < end, f"the moment to kill never came: {self.log}"
            time.sleep(0.002)
        self.kill()


def run_script(folder, script, *arguments, environment=None, cwd=ROOT, prepare=None):
    """Run a script ("train.py") or module ("tools.look") to its end; return (exit status, what it printed)."""
    started = Script(folder, script, arguments, environment, cwd, prepare)
    status = started.wait()
    return status, started.log


def output_of(folder, script, *arguments, **options):
    """Run a script to its end, which must be a good one; return what it printed."""
    status, printed = run_script(folder, script, *arguments, **options)
    assert status == 0, printed
    return printed


def without_curves():
    """Let train.py leave out loss.png, which costs as much as many tiny updates: a `prepare` of `run_script`."""
    from training.run import RunLogger

    RunLogger.draw = lambda logger: None


def run_ranks(folder, script, *arguments, count=2):
    """Run a script in `count` gloo processes as torchrun would; return the list of (exit status, output)."""
    started = start_ranks(folder, script, *arguments, count=count)
    return [(one.wait(), one.log) for one in started]


def start_ranks(folder, script, *arguments, count=2):
    """Start a script in `count` gloo processes; return the list of `Script`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [Script(folder, script, arguments, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)]
