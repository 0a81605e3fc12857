"""Methods compared, and the paper's tables reproduced."""
