"""Each kind of bad input is one clear line from the first node. Nodes are threads here that meet in a real folder; the
same check as processes of srun is in tests/slurm/."""

import dataclasses
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from megatron_r1.__main__ import parse
from megatron_r1.cluster import preflight
from megatron_r1.cluster.preflight import Meeting, look
from megatron_r1.cluster.roles import roles_of
from megatron_r1.pipeline.folder import is_finished, prepare_folder
from megatron_r1.pipeline.kinds import needs_of
from megatron_r1.recipes import RECIPES

NAMES = ["alpha", "beta", "gamma"]
LOOPBACK = {"MEGATRON_R1_INTERFACE": "lo"}


def report(node, **fields):
    return dataclasses.replace(look(node, NAMES[node], gpus=0, environment=LOOPBACK), **fields)


def meet(folders, clocks=(time.time,) * 3, wait_seconds=10.0, admitted=True):
    """(reports and faults of node 0, exit statuses of the others), the nodes being threads with a folder each."""
    for folder in set(folders):
        (folder / "nodes").mkdir(exist_ok=True)
    statuses = {}

    def attend(node):
        meeting = Meeting(folders[node], NAMES, wait_seconds=wait_seconds, clock=clocks[node])
        statuses[node] = meeting.attend(report(node))

    threads = [threading.Thread(target=attend, args=(node,)) for node in (1, 2)]
    for thread in threads:
        thread.start()
    first = Meeting(folders[0], NAMES, wait_seconds=wait_seconds, clock=clocks[0])
    found = first.gather(report(0))
    if admitted and not found[1]:
        first.admit({"done": 0})
    else:
        first.refuse()
    for thread in threads:
        thread.join()
    return *found, statuses


def test_nodes_that_share_a_folder_and_a_clock_are_admitted(tmp_path):
    reports, faults, statuses = meet([tmp_path] * 3)
    assert faults == [] and statuses == {1: 0, 2: 0}
    assert [one.name for one in reports] == NAMES and reports[1].address == "127.0.0.1"
    assert (tmp_path / "roles").read_text() == "done=0\n"


def test_a_refusal_reaches_every_node(tmp_path):
    assert meet([tmp_path] * 3, admitted=False)[2] == {1: 2, 2: 2}


def test_a_folder_that_is_not_shared(tmp_path, monkeypatch):
    for name in ("LOCK_SECONDS", "ANSWER_SECONDS", "CHECK_SECONDS"):
        monkeypatch.setattr(preflight, name, 0.0)
    (tmp_path / "elsewhere").mkdir()
    _, faults, statuses = meet([tmp_path, tmp_path, tmp_path / "elsewhere"], wait_seconds=1.0)
    (fault,) = faults
    assert fault.startswith("shared folder: nothing that gamma wrote") and "seen on alpha" in fault
    assert statuses == {1: 2, 2: 2}


def test_a_node_that_still_pulls_its_image_is_waited_for_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "TELL_SECONDS", 0.5)
    (tmp_path / "nodes").mkdir()
    names, told, statuses = NAMES[:2], [], []

    def late() -> None:
        time.sleep(2.0)
        statuses.append(Meeting(tmp_path, names, wait_seconds=30.0).attend(report(1)))

    thread = threading.Thread(target=late)
    thread.start()
    first = Meeting(tmp_path, names, wait_seconds=30.0, tell=told.append)
    reports, faults = first.gather(report(0))
    first.admit({"done": 0})
    thread.join()
    assert faults == [] and len(reports) == 2 and statuses == [0]
    assert told and all(said.startswith("waiting for beta, ") and said.endswith(" of 30 s") for said in told)


def test_a_node_that_never_comes_is_named_with_both_remedies(tmp_path):
    (tmp_path / "nodes").mkdir()
    _, (fault,) = Meeting(tmp_path, NAMES[:2], wait_seconds=0.5).gather(report(0))
    assert "nothing that beta wrote" in fault and "all nodes share" in fault and "raise PREFLIGHT_SECONDS" in fault


@pytest.mark.parametrize(("shift", "words"), [(-37.0, "beta is 37 s behind alpha"), (41.0, "beta is 41 s ahead of")])
def test_clocks_apart(tmp_path, shift, words):
    _, (fault,), _ = meet([tmp_path] * 3, clocks=(time.time, lambda: time.time() + shift, time.time))
    assert fault.startswith("clocks: ")
    seconds = float(fault.split()[3])
    assert abs(seconds - abs(shift)) <= 1.5 and words.split("s ", 1)[1] in fault


def test_a_lock_that_does_not_hold_on_another_node(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "is_locked", lambda path: False)
    _, faults, _ = meet([tmp_path] * 3)
    assert len(faults) == 2 and all("does not hold on" in fault for fault in faults)


def test_a_real_lock_is_seen(tmp_path):
    with open(tmp_path / "held", "w") as held:
        assert not preflight.is_locked(tmp_path / "held")
        fcntl.flock(held, fcntl.LOCK_EX)
        assert preflight.is_locked(tmp_path / "held")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a", "b"], "tiny needs 3 node(s) of 1 slot(s)"),
        (["a", "b", "c", "d"], "has 4, of which some would be idle: submit it with --nodes=3"),
        (["a", "b", "b"], "names b more than once"),
    ],
)
def test_a_host_list_that_does_not_match_the_roles(names, words):
    layout = roles_of(needs_of(RECIPES["tiny"]()), slots_per_node=1)
    (fault,) = preflight.role_faults("tiny", layout, names, 1)
    assert words in fault
    assert preflight.role_faults("tiny", layout, ["a", "b", "c"], 1) == []


def test_a_container_without_transformer_engine_and_nodes_without_gpus():
    config = RECIPES["sft_671b"]()
    layout = dataclasses.replace(roles_of(needs_of(config), slots_per_node=8), trainer_nodes=2)
    whole = [report(node, gpus=8, transformer_engine=True) for node in range(3)]
    assert preflight.node_faults(needs_of(config), layout, whole, 8) == []
    lacking = [whole[0], dataclasses.replace(whole[1], transformer_engine=False, gpus=7), whole[2]]
    gpus, container = preflight.node_faults(needs_of(config), layout, lacking, 8)
    assert gpus == "GPUs: fewer than 8 are seen on beta (7)"
    assert container.startswith("container: Transformer Engine is not installed on beta;")


def test_nodes_with_other_packages_or_no_address():
    config = RECIPES["tiny"]()
    layout = roles_of(needs_of(config), slots_per_node=1)
    reports = [report(0), report(1, fault="no address"), report(2)]
    reports[2].versions["torch"] = "1.0"
    address, unsupported, versions = preflight.node_faults(needs_of(config), layout, reports, 1)
    assert address == "beta: no address"
    assert unsupported == "versions: torch is 1.0 on gamma; this program works with torch>=2.11: " + (
        "pip install 'torch>=2.11'"
    )
    assert "gamma has torch 1.0 instead of " in versions


def test_a_vllm_that_cannot_take_weights_is_refused_before_anything_is_loaded():
    config = RECIPES["grpo_671b"]()
    layout = roles_of(needs_of(config), slots_per_node=8)
    reports = [report(node, gpus=8, transformer_engine=True) for node in range(3)]
    for each in reports:
        each.versions["vllm"] = "0.31.0"
    (fault,) = preflight.node_faults(needs_of(config), layout, reports, 8)
    assert fault.startswith("versions: vllm is 0.31.0 on alpha; this program works with vllm>=0.32,<0.34")


def test_gloo_transfers_are_refused_over_machines():
    config = RECIPES["tiny"]()
    layout = roles_of(needs_of(config), slots_per_node=1)
    (fault,) = preflight.node_faults(needs_of(config), layout, [report(0), report(1), report(2, boot="other")], 1)
    assert fault.startswith("rollout.sync is gloo") and "gamma" in fault


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (fault,) = preflight.port_faults("127.0.0.1", port, "alpha")
        assert f"port {port} cannot be used on alpha (127.0.0.1)" in fault and "in use" in fault
    assert preflight.port_faults("127.0.0.1", port, "alpha") == []


def sft(run_dir: Path, **fields):
    config = RECIPES["sft_671b"]()
    return dataclasses.replace(config, run_dir=run_dir, if_exists="resume", **fields)


def test_a_stale_lock_file(tmp_path):
    """A file that nobody holds is no obstacle; one that is held is named with its process and what to do."""
    config = sft(tmp_path / "run")
    prepared = prepare_folder(config)
    (fault,) = preflight.run_folder_faults(config, wait_seconds=0.2)
    assert f"process {os.getpid()}@{socket.gethostname()}" in fault
    assert f"the lock is stale, remove {tmp_path / 'run' / '.lock'}" in fault
    prepared.lock.close()
    assert (tmp_path / "run" / ".lock").exists() and preflight.run_folder_faults(config) == []


def test_the_last_attempts_lock_is_waited_for(tmp_path):
    config = sft(tmp_path / "run")
    prepared = prepare_folder(config)
    threading.Timer(0.5, prepared.lock.close).start()
    assert preflight.run_folder_faults(config, wait_seconds=10) == []


def test_a_checkpoint_of_another_model(tmp_path):
    config = sft(tmp_path / "run")
    prepare_folder(config).lock.close()
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, path=Path("models/another")))
    assert preflight.run_folder_faults(other) == [], "nothing was saved yet: it is begun anew"
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert preflight.run_folder_faults(config) == []
    (fault,) = preflight.run_folder_faults(other)
    assert "holds checkpoints of another model (model.path 'models/DeepSeek-V3-Base', now 'models/another')" in fault
    assert "\n" not in fault


def test_only_the_end_of_this_very_run_counts_as_finished(tmp_path):
    config = sft(tmp_path / "run")
    prepare_folder(config).lock.close()
    assert not is_finished(config)
    (tmp_path / "run" / "summary.json").write_text("{}")
    assert is_finished(config)
    assert not is_finished(dataclasses.replace(config, seed=5))
    assert not is_finished(dataclasses.replace(config, if_exists="archive"))


def test_recipes_are_read_as_by_run():
    assert parse(["evaluate", "--model", "m", "--run-dir", "r"]).name == "evaluation"


def test_a_report_is_plain_json():
    assert json.loads(json.dumps(dataclasses.asdict(report(1))))["name"] == "beta"
