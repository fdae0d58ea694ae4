"""The assignment of rows to columns with the largest sum, on the host: shortest augmenting paths."""

import numpy as np
from jaxtyping import Float, Int


def assign(score: Float[np.ndarray, "n n"]) -> Int[np.ndarray, "n"]:
    """The column of each row, so that no column is taken twice and the sum of the scores is as large as can be.

    Time grows with n^3, in n^2 vector operations.

    Example:
      >>> import numpy as np
      >>> assign(np.array([[1.0, 3.0], [2.0, 5.0]])).tolist()
      [0, 1]

    Source: Jonker and Volgenant 1987, doi:10.1007/BF02278710.
    """
    cost = -np.asarray(score, np.float64)
    n = len(cost)
    row_price, column_price = np.zeros(n), np.zeros(n)
    row_of = np.full(n, -1)  # of each column
    for row in range(n):
        distance = np.full(n, np.inf)
        before = np.full(n, -1)  # the column before, on the shortest path
        open_ = np.ones(n, bool)
        i, reached, last = row, 0.0, -1
        while True:
            through = reached + cost[i] - row_price[i] - column_price
            nearer = open_ & (through < distance)
            distance[nearer], before[nearer] = through[nearer], last
            last = int(np.argmin(np.where(open_, distance, np.inf)))
            reached, open_[last] = distance[last], False
            if row_of[last] < 0:
                break
            i = row_of[last]
        done = ~open_
        on_path = done.copy()
        on_path[last] = False
        row_price[row] += reached
        row_price[row_of[on_path]] += reached - distance[on_path]
        column_price[done] -= reached - distance[done]
        while last >= 0:  # swap along the path
            previous = before[last]
            row_of[last] = row if previous < 0 else row_of[previous]
            last = previous
    columns = np.empty(n, int)
    columns[row_of] = np.arange(n)
    return columns
