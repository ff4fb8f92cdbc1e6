"""Race: find the best recipe for a task by halving the field on longer and longer trainings."""

from downslope.race.race import race
from downslope.race.standings import Row, Standings

__all__ = ["Row", "Standings", "race"]
