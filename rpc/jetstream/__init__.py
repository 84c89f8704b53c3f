"""Protocol jetstream_proto and its generated stubs; `scripts/generate_protos` writes them."""
