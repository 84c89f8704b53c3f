"""Protocol jaxserve.v1 and its generated stubs; `scripts/generate_protos` writes them."""
