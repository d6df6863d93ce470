"""One model on several ranks: dense parameters by DDP or FSDP2, tables replicated or sharded by TorchRec."""

from .unfused import sparse_gradients as sparse_gradients
from .unfused import table_parameters as table_parameters
