"""Ray clusters on this machine, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_MEMORY = 100 << 20


@contextmanager
def ray_cluster(nodes: int = 1, cores: int = 1) -> Iterator[str]:
    """The address of a cluster of so many nodes with so many cores each. Skips the test where Ray
    is not installed."""
    pytest.importorskip("ray", reason="--ray needs the extra `ray`")
    from ray.cluster_utils import Cluster

    head = {"num_cpus": cores, "include_dashboard": False, "object_store_memory": _MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=cores, object_store_memory=_MEMORY)
        yield cluster.address
    finally:
        cluster.shutdown()
