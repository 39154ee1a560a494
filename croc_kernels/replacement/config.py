"""What the replacement api and the op's implementations agree on."""

# Source of a token that is kept. Any other negative source is an index that the pool does not have.
KEEP = -(2**63)
