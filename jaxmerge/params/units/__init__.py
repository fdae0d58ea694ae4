"""The units of a network have no order: match them, merge them all or in part; locks against it."""
