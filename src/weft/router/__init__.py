"""HTTP in, one stream out. Owns each open request; never loads torch, never sees a block."""
