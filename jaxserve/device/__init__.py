"""What runs on the devices, and what the host does to run it there."""
