"""Settings and fixtures of all tests: one thread per worker, LPIPS with random features, a quick torch.compile.

It imports torch in its fixtures only: pytest-xdist reads this file before it starts the workers, and needs none.
"""

import functools
import os
import pathlib
import sys
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("SLIMFLOW_TEST_DEVICE") != "cuda":  # before torch is imported: the tests are those of a CPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Also where the environment asks for more."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def repository():
    """The root of the repository, where the scripts are."""
    return ROOT


@pytest.fixture
def data_folder():
    """The recorded numbers that tests compare with."""
    return ROOT / "tests" / "data"


@pytest.fixture(scope="session")
def random_lpips():
    """The package's LPIPS with random VGG16 features (and its real last layers)."""
    import lpips
    import torch

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)


@pytest.fixture(scope="session")
def torch_home(random_lpips, tmp_path_factory):
    """A folder for TORCH_HOME whose cache holds the same features as VGG16 has them, without its classifier."""
    import torch

    folder = tmp_path_factory.mktemp("torch_home")
    path = folder / "hub/checkpoints/vgg16-397923af.pth"
    path.parent.mkdir(parents=True)
    features = {"features." + name.partition(".")[2]: value for name, value in random_lpips.net.state_dict().items()}
    torch.save(features, path)
    return folder


@pytest.fixture
def cuda_graphs(monkeypatch):
    """A list of what torch.compile compiles; each graph returns the same memory at every call, as CUDA graphs do."""
    import torch
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def backend(graph, inputs, mode="default"):
        assert not any(isinstance(value, torch.SymInt) for value in inputs)  # one graph for all batch sizes is slower
        graphs.append(mode)
        return aot_autograd(fw_compiler=in_one_memory, bw_compiler=in_one_memory)(graph, inputs)

    def in_one_memory(graph, inputs):
        memory = {}

        def replay(*arguments):
            outputs = list(graph(*arguments))
            for number, output in enumerate(outputs):
                if torch.is_tensor(output):
                    outputs[number] = memory.setdefault(number, output.clone()).copy_(output).detach()
            return outputs

        return make_boxed_func(replay)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield graphs
    torch._dynamo.reset()
