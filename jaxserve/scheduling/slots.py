"""Who has which slot."""

from jaxserve.scheduling.sequence import Sequence, StepPlan


class Slots:
    """A fixed number of slots, numbered from 0; of the free ones, the one that was freed last is given first."""

    def __init__(self, count: int):
        self.count = count
        self.running: list[Sequence] = []
        """Holders of a slot, in order of admission."""
        self._free = list(reversed(range(count)))
        self._new_owners: list[tuple[int, Sequence]] = []

    @property
    def is_any_free(self) -> bool:
        """Whether `give` may be called."""
        return bool(self._free)

    def give(self, sequence: Sequence) -> None:
        """Gives a sequence a free slot."""
        sequence.slot = self._free.pop()
        self.running.append(sequence)
        self._new_owners.append((sequence.slot, sequence))

    def take_back(self, *sequences: Sequence) -> None:
        """Frees the slots of those that have one."""
        freed = [sequence.slot for sequence in sequences if sequence.slot >= 0]
        self._free += freed
        for sequence in sequences:
            sequence.slot = -1
        if freed:
            self.running = [sequence for sequence in self.running if sequence.slot >= 0]

    def hand_over(self, plan: StepPlan) -> None:
        """Puts into a step's plan the slots that changed hands since the last."""
        plan.new_owners, self._new_owners = self._new_owners, []

    def lose_content(self) -> None:
        """The device lost its state. Every sequence has given back its slot."""
        self._new_owners = []

    def check(self) -> None:
        """Asserts that each slot is free or owned once."""
        slots = [sequence.slot for sequence in self.running] + self._free
        assert sorted(slots) == list(range(self.count)), "a slot is lost or owned twice"
