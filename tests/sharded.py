"""`trim ...` as one of several ranks whose model is in shards, as accelerate has it on accelerators alone.

python -m tests.sharded ...   under torchrun, with the environment `SHARDED`: CPUs are said to be another kind of device
"""

from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}

_init = PartialState.__init__


def _pretending(self: Any, *args: Any, **kwargs: Any) -> None:
    _init(self, *args, **kwargs)
    if self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    from trimcli.cli.app import main

    PartialState.__init__ = _pretending
    main()
