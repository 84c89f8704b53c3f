"""Policy: who takes part in the next step, and which page of the cache is whose. Knows no device."""
