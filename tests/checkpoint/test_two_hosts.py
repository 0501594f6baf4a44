"""Two hosts: network namespaces that are joined by a pair of virtual devices, with a rendezvous between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from fastmatch.cli.main import main
from helpers.llama_pair import contents, write_llama_pair

pytest.importorskip("transformers")

HOSTS = (("10.201.77.1", "fmv0"), ("10.201.77.2", "fmv1"))
"""Address and device of each host."""
PATIENT = "timeout=600,read_timeout=600,join_timeout=600"
"""Seconds that a launcher waits for the other, which may start much later on a busy machine."""


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """The names of two namespaces that see each other and nothing else."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"fastmatch-{os.getpid()}-{k}" for k in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            (_, first), (_, second) = HOSTS
            ip(
                "link",
                "add",
                first,
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                second,
                "netns",
                names[1],
            )
            for name, (address, device) in zip(names, HOSTS, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
                ip("-n", name, "link", "set", device, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_hosts_write_the_files_of_one_process(hosts, tmp_path):
    write_llama_pair(tmp_path)
    arguments = [str(tmp_path / "a"), str(tmp_path / "b"), "--merge", "0.25", "--out"]
    runs = []
    for name, (address, device) in zip(hosts, HOSTS, strict=True):
        # A namespace has the machine's host name, so that a launcher cannot tell whether the address is its own.
        settings = f"--rdzv-conf=is_host={int(address == HOSTS[0][0])},{PATIENT}"
        rendezvous = [
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={HOSTS[0][0]}:29417",
            "--rdzv-id=pair",
            settings,
        ]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        command = [*launcher, *rendezvous, f"--local-addr={address}", "-m", "fastmatch", "align"]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": device, "FASTMATCH_TIMEOUT": "300"}
        runs.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command, *arguments, str(tmp_path / "out")],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    said = [run.communicate(timeout=600) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n\n".join(errors for _, errors in said)
    assert sorted(out.count("wrote") for out, _ in said) == [0, 1]  # rank 0 speaks
    assert main(["align", *arguments, str(tmp_path / "alone")]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
