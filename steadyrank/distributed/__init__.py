"""One model on several ranks: dense parameters by DDP or FSDP2, tables replicated or sharded by TorchRec."""
