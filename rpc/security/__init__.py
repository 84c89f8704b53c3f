"""Who may call: keys by tenant, TLS, and what one tenant may take. Every protocol asks the same `Access`."""
