"""Who computes: the choice, forcing it, explaining it, and what happens where nothing is built."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

import newllm_kernels as nk
from newllm_kernels import __main__ as report
from newllm_kernels import backends, native

X = torch.arange(6.0).view(2, 3)
needs_library = pytest.mark.skipif(not native.library().ok, reason="the C++ kernels are not built")


@pytest.fixture
def clean_choice(monkeypatch):
    """Remembered choices and given warnings are forgotten before the test and after it."""
    monkeypatch.setattr(backends, "_cache", {})
    monkeypatch.setattr(backends, "_warned", set())


@pytest.fixture
def no_library(monkeypatch, clean_choice):
    verdict = native.Verdict(False, "the C++ kernels are not built; build them with: pip install -e .")
    monkeypatch.setattr(native, "library", lambda: verdict)


@pytest.fixture
def who(monkeypatch, clean_choice):
    """The backends that layer_norm's forward and backward ran on, in order."""
    calls = []

    def spied(implementation):
        def spy(way, kernel):
            def run(*args):
                calls.append((implementation.backend, way))
                return kernel(*args)

            return run

        return backends.Implementation(
            implementation.backend, spy("forward", implementation.forward), spy("backward", implementation.backward),
            implementation.supports,
        )  # fmt: skip

    registry = {name: spied(implementation) for name, implementation in backends._registry["layer_norm"].items()}
    monkeypatch.setitem(backends._registry, "layer_norm", registry)
    return calls


def python(code, **variables):
    return subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, env=os.environ | variables, check=False
    )


# ---- use_backend ---------------------------------------------------------------------------------------------------


@needs_library
def test_the_choice_is_obeyed_forward_and_backward(who):
    x = X.clone().requires_grad_()
    nk.layer_norm(x).sum().backward()
    with nk.use_backend("reference"):
        nk.layer_norm(x).sum().backward()
        y = nk.layer_norm(x)
    y.sum().backward()  # after the block: on what is chosen then
    assert who == [
        ("cpu", "forward"), ("cpu", "backward"), ("reference", "forward"), ("reference", "backward"),
        ("reference", "forward"), ("cpu", "backward"),
    ]  # fmt: skip


def test_use_backend_nests_and_restores():
    before = nk.current_backend()
    with nk.use_backend("reference"):
        assert nk.current_backend() == "reference"
        with nk.use_backend("cpu"):
            assert nk.current_backend() == "cpu"
        assert nk.current_backend() == "reference"
        with pytest.raises(ZeroDivisionError), nk.use_backend("auto"):
            raise ZeroDivisionError
        assert nk.current_backend() == "reference"
    assert nk.current_backend() == before


def test_an_unknown_backend_is_refused_and_changes_nothing():
    before = nk.current_backend()
    with pytest.raises(ValueError, match="use_backend: got 'tpu', wanted one of auto, cuda, triton, cpu, reference"):
        nk.use_backend("tpu").__enter__()
    assert nk.current_backend() == before


def test_the_choice_holds_in_other_threads(who):
    """Autograd runs backward passes in threads of its own."""
    with nk.use_backend("reference"):
        thread = threading.Thread(target=nk.layer_norm, args=(X,))
        thread.start()
        thread.join()
    assert who == [("reference", "forward")]


def test_a_backend_that_has_no_kernel_raises(monkeypatch, clean_choice):
    monkeypatch.delitem(backends._registry["layer_norm"], "triton", raising=False)
    with (
        nk.use_backend("triton"),
        pytest.raises(nk.BackendError, match=r"layer_norm: .*'triton' cannot serve .*: has no kernel for layer_norm"),
    ):
        nk.layer_norm(X)
    assert issubclass(nk.BackendError, ValueError)


def test_cuda_refuses_cpu_tensors_of_the_operation_it_has():
    with nk.use_backend("cuda"), pytest.raises(nk.BackendError, match="serves CUDA tensors, these are on cpu"):
        nk.context_update(X, X, X, X)


# ---- NEWLLM_KERNELS_BACKEND ----------------------------------------------------------------------------------------

SHOW = "import torch, newllm_kernels as nk; print(nk.current_backend()); nk.explain('scan', torch.ones(1, 2, 3))"


def test_the_variable_chooses():
    done = python(["-c", SHOW], NEWLLM_KERNELS_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "reference"
    assert [line.split()[1] for line in lines if line.startswith("->")] == ["reference"]


def test_an_unknown_name_in_the_variable_is_refused():
    done = python(["-c", SHOW], NEWLLM_KERNELS_BACKEND="fastest")
    assert done.returncode != 0
    assert "NEWLLM_KERNELS_BACKEND: got 'fastest', wanted one of auto, cuda, triton, cpu, reference" in done.stderr


# ---- explain -------------------------------------------------------------------------------------------------------


@needs_library
def test_explain_marks_the_choice_and_gives_every_reason(capsys, monkeypatch):
    monkeypatch.delitem(backends._registry["gated_scan"], "triton", raising=False)
    text = nk.explain("gated_scan_packed", torch.ones(1, 2, 6))
    assert capsys.readouterr().out == text + "\n"
    head, *lines = text.splitlines()
    assert head == "gated_scan_packed of torch.float32 on cpu, width 2 (choice: auto)"
    assert [line[3:].split()[:2] for line in lines] == [
        ["cuda", "no"], ["triton", "no"], ["cpu", "yes"], ["reference", "yes"],
    ]  # fmt: skip
    assert [line.split()[1] for line in lines if line.startswith("->")] == ["cpu"]
    assert f"C++, {native.active_isa()}" in text
    assert "triton     no   has no kernel for gated_scan" in text


def test_explain_says_that_a_forced_call_would_raise():
    with nk.use_backend("cuda"):
        text = nk.explain("scan", a=torch.ones(1, 2, 3), b=torch.ones(1, 2, 3))
    assert "->" not in text
    assert text.endswith("the call would raise: 'cuda' cannot serve it")


def test_the_size_of_a_call_may_decide(monkeypatch, clean_choice):
    """Of two backends that can serve, a rank makes `auto` take the later one; LayerNorm's on a GPU is such a rank."""

    def able(backend, rank=lambda call: 0):
        return backends.Implementation(backend, None, None, lambda call: backends.Verdict(True, "a test"), rank)

    later = able("triton", backends._registry["layer_norm"]["triton"].rank)
    monkeypatch.setitem(backends._registry, "layer_norm", {"cuda": able("cuda"), "triton": later})
    small, large = torch.empty(2, 8), torch.empty(backends.SMALL // 8 + 1, 8)
    assert [backends.select("layer_norm", x, 8).backend for x in (small, large)] == ["cuda", "triton"]
    assert "measured slower" not in nk.explain("layer_norm", small)
    lines = nk.explain("layer_norm", large).splitlines()[1:]
    assert lines[0].startswith("   cuda       yes  a test; measured slower")
    assert lines[1].startswith("-> triton")


@pytest.mark.parametrize(
    ("width", "dtype", "first"),
    [
        (256, torch.bfloat16, "cuda"), (256, torch.float32, "triton"), (1024, torch.bfloat16, "triton"), (8192, torch.bfloat16, "triton"), (8200, torch.bfloat16, "cuda"),
        (65536, torch.float16, "cuda"), (8201, torch.bfloat16, "triton"), (65536, torch.float32, "triton"),
    ],
)  # fmt: skip
def test_wide_rows_go_where_they_were_measured_faster(width, dtype, first):
    rank = backends._registry["layer_norm"]["triton"].rank
    call = backends.Call(torch.device("cuda", 0), dtype, width)
    assert (rank(call) > 0) == (first == "triton")  # CUDA's is 0, and comes first among equals


@pytest.mark.skipif(not native.has_cuda_kernels(), reason="built without nvcc")
@pytest.mark.parametrize("operation", ["scan", "gated_scan"])
@pytest.mark.parametrize(("kilobytes", "serves"), [(99, False), (163, True), (227, True)])
def test_a_gpu_with_too_little_shared_memory_is_refused(operation, kilobytes, serves, monkeypatch):
    """A GeForce, an A100, an H100."""
    monkeypatch.setattr(backends, "supports_cuda", lambda call: backends.Verdict(True, "a test"))
    properties = SimpleNamespace(shared_memory_per_block_optin=kilobytes * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    call = backends.Call(torch.device("cuda", 0), torch.float32, 64)
    verdict = backends._registry[operation]["cuda"].supports(call)
    assert verdict.ok == serves
    assert serves or verdict.reason == "needs 107040 bytes of shared memory a block, a GPU has 101376"


@pytest.mark.parametrize("operation", ["scan", "gated_scan", "context_update", "context_scan", "layer_norm"])
def test_explain_agrees_with_what_runs(operation, clean_choice):
    x = torch.ones(1, 2, 3)
    chosen = re.search(r"-> (\w+)", nk.explain(operation, x)).group(1)
    assert backends.select(operation, x, 3).backend == chosen


def test_a_large_forward_of_the_cell_is_tritons(monkeypatch, clean_choice):
    yes = backends.Verdict(True, "a test")
    for backend in ("cuda", "triton", "reference"):
        implementation = backends._registry["context_update"][backend]
        monkeypatch.setitem(
            backends._registry["context_update"],
            backend,
            dataclasses.replace(implementation, supports=lambda call: yes),
        )
    c = torch.empty(2**14, 512, device="meta")
    gates = torch.empty(2**14, 3 * 512, device="meta")
    for few, many in ((1, 2**14), (2**13, 2**14)):
        for rows, taken in ((few, "cuda"), (many, "triton")):
            for text in (
                nk.explain("context_update", *[c[:rows]] * 4),
                nk.explain("context_update_packed", gates[:rows], c[:rows]),
                nk.explain("context_update_packed", gates=gates[:rows], c=c[:rows]),
            ):
                assert f"-> {taken}" in text


def test_explain_knows_every_public_function():
    for name in set(nk.__all__) - {"current_backend", "explain", "operations", "record_seams", "use_backend"}:
        if name.islower():
            assert nk.explain(name, torch.ones(1, 2, 3)).startswith(name)


def test_explain_refuses_what_it_cannot_explain():
    with pytest.raises(ValueError, match=r"operation: got 'attention', wanted one of .*gated_scan"):
        nk.explain("attention", X)
    with pytest.raises(TypeError, match="explain: wanted the arguments of the call, at least one tensor"):
        nk.explain("layer_norm", 3)


# ---- without a library ---------------------------------------------------------------------------------------------


def test_without_the_library_the_reference_serves_and_says_so_once(no_library):
    with pytest.warns(
        UserWarning, match=r"newllm_kernels.layer_norm runs on the slow reference backend .* pip install -e"
    ):
        y = nk.layer_norm(X)
    assert torch.allclose(y, torch.nn.functional.layer_norm(X, (3,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nk.layer_norm(X)
        nk.layer_norm(torch.ones(2, 4))  # nor for another width


def test_without_the_library_the_cpu_backend_raises(no_library):
    with (
        nk.use_backend("cpu"),
        pytest.raises(nk.BackendError, match=r"the C\+\+ kernels are not built; .*pip install"),
    ):
        nk.layer_norm(X)


def test_kernels_of_a_missing_library_raise_when_called(no_library):
    implementation = backends.native_implementation("scan", "cpu", backends.supports_cpu)
    for kernel in (implementation.forward, implementation.backward):
        with pytest.raises(nk.BackendError, match="not built"):
            kernel(X)


@pytest.mark.parametrize(("exists", "reason"), [(False, "not built"), (True, "does not load into PyTorch")])
def test_library_reports_why_it_does_not_load(monkeypatch, tmp_path, exists, reason):
    path = tmp_path / "libnewllm_kernels.so"
    if exists:
        path.write_bytes(b"no shared object")
    monkeypatch.setattr(native, "LIBRARY", path)
    verdict = native.library.__wrapped__()
    assert not verdict.ok
    assert reason in verdict.reason


def test_a_choice_is_remembered_but_not_without_end(clean_choice):
    for width in range(1, 4200):
        backends.select("layer_norm", X, width)
    assert len(backends._cache) <= 4097


# ---- the report ----------------------------------------------------------------------------------------------------


def test_the_report_runs_as_a_program():
    done = python(["-m", "newllm_kernels"])
    assert done.returncode == 0, done.stderr
    for word in (nk.__version__, torch.__version__, "triton", "library", "backend", *nk.operations()):
        assert word in done.stdout


def test_the_report_runs_without_library_and_build(no_library, monkeypatch):
    def missing():
        raise ImportError("newllm_kernels._C is not built")

    monkeypatch.setattr(native, "build_info", missing)
    text = report.report()
    assert "library         the C++ kernels are not built" in text
    assert "build           newllm_kernels._C is not built" in text
    assert re.search(r"scan +cpu +reference$", text, re.MULTILINE)
