"""Everything of vLLM's that engines/vllm/ names, private things included, against the version that is installed.

Read from our source by AST, so that a new import or call is held against vLLM without a list being kept here. What
cannot be read from it (routes, environment, flags) is looked up in vLLM's own source. Which versions are supported is
config/packages.py's to say; each is tried by running this under it.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_r1.config import RolloutConfig, load_shape
from megatron_r1.config.engines import ENGINES
from megatron_r1.config.packages import SUPPORTED, fits, installed_versions, version_faults
from megatron_r1.engines.vllm.command import NodeSpan, server_command, server_environment
from megatron_r1.recipes.tiny import TINY_V3

vllm = pytest.importorskip("vllm")
FOLDER = Path(__file__).parents[3] / "megatron_r1" / "engines" / "vllm"
FILES = sorted(FOLDER.glob("*.py"))
INSTALLED = Path(vllm.__file__).parent


def named(tree: ast.AST) -> dict[str, tuple[str, str]]:
    """The names that a file imports from vLLM, at any depth: (module, name in it)."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            found |= {alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names}
    return found


def resolve(module: str, name: str) -> object:
    imported = importlib.import_module(module)
    return getattr(imported, name) if hasattr(imported, name) else importlib.import_module(f"{module}.{name}")


def uses(path: Path) -> Iterator[tuple[str, object, ast.Call | None]]:
    """(where, what it is, the call if it is called) of each name of vLLM's in a file, or attribute of one."""
    tree = ast.parse(path.read_text())
    names = named(tree)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        owner = node.value if isinstance(node, ast.Attribute) else node
        if not isinstance(owner, ast.Name) or owner.id not in names:
            continue
        found = resolve(*names[owner.id])
        if isinstance(node, ast.Attribute):
            found = getattr(found, node.attr)  # AttributeError: this version does not have it
        yield f"{path.name}:{node.lineno}: {ast.unparse(node)}", found, called.get(id(node))


def bind(called: Callable, node: ast.Call) -> None:
    """TypeError if the call's arguments do not fit; arguments behind a star are not known here."""
    signature = inspect.signature(called)
    positional = [None for argument in node.args if not isinstance(argument, ast.Starred)]
    keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg is not None}
    open_ended = len(positional) < len(node.args) or len(keywords) < len(node.keywords)
    (signature.bind_partial if open_ended else signature.bind)(*positional, **keywords)


def test_a_wrong_argument_is_found():
    from vllm.distributed.weight_transfer.base import ParamMeta

    for call in ("ParamMeta('w', None, (1,), 2)", "ParamMeta('w', None)", "ParamMeta(name='w', dtype=None, size=())"):
        with pytest.raises(TypeError):
            bind(ParamMeta, ast.parse(call).body[0].value)  # pyright: ignore[reportAttributeAccessIssue]


def test_every_name_is_there_and_every_call_fits():
    wrong, found = [], [use for path in FILES for use in uses(path)]
    for where, value, call in found:
        try:
            if call is not None:
                bind(value, call)  # pyright: ignore[reportArgumentType]
        except TypeError as error:
            wrong.append(f"{where}: {error}")
    assert not wrong
    assert len(found) > 30 and sum(call is not None for _, _, call in found) > 10


def test_the_module_that_a_server_runs_is_there():
    (module,) = re.findall(r'run_module\("([\w.]+)"', (FOLDER / "launch.py").read_text())
    assert importlib.util.find_spec(module) is not None


def test_the_transfer_engine_is_whole():
    """No method is missing, those that vLLM calls take what it gives them, and what they read of `self` is there."""
    from megatron_r1.engines.vllm.shard_engine import ShardWeightTransferEngine

    ours = ShardWeightTransferEngine
    assert not ours.__abstractmethods__
    (base,) = (parent for parent in ours.__mro__ if parent.__module__.startswith("vllm.") and parent in ours.__bases__)
    for method, function in vars(ours).items():
        if inspect.isfunction(function) and hasattr(base, method):
            theirs = list(inspect.signature(getattr(base, method)).parameters)
            assert list(inspect.signature(function).parameters) == theirs, method
    lines = "".join(inspect.getsource(parent) for parent in ours.__mro__ if parent.__module__.startswith("vllm."))
    read = set(re.findall(r"\bself\.(\w+)", inspect.getsource(ours)))
    missing = [one for one in read if not hasattr(ours, one) and not re.search(rf"\bself\.{one}\b[^=\n]*=", lines)]
    assert not missing


def test_a_communicator_takes_what_nccl_peers_give_it():
    """They are called through an attribute, which the search above does not follow."""
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

    for name in ("send", "recv"):
        inspect.signature(getattr(PyNcclCommunicator, name)).bind(None, None, 1, stream=None)
    for name in ("group_start", "group_end", "destroy"):
        inspect.signature(getattr(PyNcclCommunicator, name)).bind(None)
    made = inspect.signature(PyNcclCommunicator.from_unique_id_bytes)
    made.bind(b"", rank=0, world_size=2, device=None)


def test_what_reload_sets_in_vllms_record_of_a_module():
    from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

    touched = set(re.findall(r"\binfo\.(\w+)|get_layerwise_info\(module\)\.(\w+)", (FOLDER / "reload.py").read_text()))
    names = {one or other for one, other in touched}
    fields = {field.name for field in dataclasses.fields(LayerReloadingInfo)}
    assert len(names) >= 3 and names <= fields | set(vars(LayerReloadingInfo))


def test_every_route_is_vllms():
    ours = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                words = [word.value for word in node.args if isinstance(word, ast.Constant)]
                words += [part.values[0].value for part in node.args if isinstance(part, ast.JoinedStr)]  # pyright: ignore
                if node.func.attr in ("request", "work", "post", "exchange"):
                    ours |= {word.partition("?")[0] for word in words if str(word).startswith("/")}
    source = "".join(path.read_text() for path in (INSTALLED / "entrypoints").rglob("*.py"))
    theirs = set(re.findall(r'(?:@router\.(?:get|post)|Mount)\(\s*"([^"]+)"', source))
    assert ours <= theirs, ours - theirs
    assert len(ours) > 12


def test_every_field_of_a_request_is_vllms():
    """A completion's and a score's parameters, and a value's request; vLLM drops what it does not know."""
    from vllm import SamplingParams
    from vllm.entrypoints.pooling.pooling.protocol import PoolingCompletionRequest
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

    tree = ast.parse((FOLDER / "client.py").read_text())
    keys = {
        function.name: {
            key.value
            for node in ast.walk(function)
            if isinstance(node, ast.Dict)
            for key in node.keys
            if isinstance(key, ast.Constant)
        }
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
    }
    request = set(GenerateRequest.model_fields)
    for name in ("generate", "score"):
        assert {"token_ids", "sampling_params"} <= keys[name] & request
        assert keys[name] - request <= set(inspect.signature(SamplingParams).parameters) | {"seed"}
    assert len(keys["generate"]) > 8
    assert keys["value"] <= set(PoolingCompletionRequest.model_fields) and len(keys["value"]) == 3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_flag_and_variable_is_vllms(device, tmp_path):
    import vllm.envs
    from vllm.entrypoints.cli import serve

    rollout = RolloutConfig(device=device, sync="ipc", tensor_parallel=2, sleep_level=1, kv_cache_dtype="fp8")
    rollout = dataclasses.replace(rollout, expert_parallel=True, draft_tokens=1, enforce_eager=True)
    assert load_shape(TINY_V3).moe is not None
    span = NodeSpan(nodes=2, node=1, address="127.0.0.1", port=29_600)
    for more in ({}, {"reward_model": True}, {"span": span}):
        words = server_command(rollout, model_path=TINY_V3, host="127.0.0.1", port=8000, seed=0, **more)[4:]
        serve.make_arg_parser(serve.FlexibleArgumentParser()).parse_args(words)  # SystemExit: it does not know one
    told = server_environment(
        rollout, base={}, model_path=TINY_V3, host="127.0.0.1", token="t", private_dir=tmp_path, visible_devices=None
    )
    ours = {name for name in told if name.startswith("VLLM_")}
    assert ours <= set(vllm.envs.environment_variables), ours - set(vllm.envs.environment_variables)
    assert len(ours) > 6


def test_the_installed_version_is_in_the_stated_range():
    """So what is checked here is checked of a version that runs are let through with, and of no other."""
    packages = set(ENGINES["vllm"].packages.values())
    versions = {name: version for name, version in installed_versions().items() if name in packages}
    assert versions and all(fits(name, version) for name, version in versions.items())
    for name in packages:
        low, _, high = SUPPORTED[name].partition(",")
        assert low.startswith("==") or high.startswith("<"), "private names are used: the range must have an end"
    (fault,) = version_faults(("vllm",), {"vllm": "0.34.0"})
    assert fault.startswith("vllm is 0.34.0; this program works with vllm>=0.32,<0.34")
