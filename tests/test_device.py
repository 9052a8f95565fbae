"""How much memory and how many CPUs a process may use."""

import os

import pytest
import torch

from training import device

CPU = torch.device("cpu")


def test_a_containers_limit_is_less_than_the_hosts_memory(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(device, "CONTAINER_LIMITS", (str(tmp_path / "missing"), str(limit)))
    whole = device.host_memory()
    assert whole == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for content, expected in (("max\n", whole), ("4096000\n", 4096000), (f"{2 * whole}\n", whole)):
        limit.write_text(content)
        assert device.host_memory() == expected
    limit.write_text("1000")
    assert device.fits_in_memory(500, CPU) and not device.fits_in_memory(501, CPU)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="not on this system")
def test_only_cpus_that_the_process_may_use_count():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert device.cpu_count() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert device.cpu_count() == len(allowed)
