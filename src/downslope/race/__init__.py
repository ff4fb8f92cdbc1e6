"""Race: find the best recipe for a task by successive halving, judged on cooldown branches, repeated on
fresh seeds.
"""

from downslope.race.race import race
from downslope.race.standings import Row, Standings

__all__ = ["Row", "Standings", "race"]
