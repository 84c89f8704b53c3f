"""What devices cannot do for a model or a configuration. Importing these takes no JAX."""


class AllocationError(ValueError):
    """The model does not fit the device; says what takes how much."""


class PlacementError(ValueError):
    """A model or configuration that the devices cannot hold in the way asked for; names the field and the limit."""
