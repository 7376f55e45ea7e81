"""Where tokens lie: page layouts, quantised records, the pool, and the way to the device."""
