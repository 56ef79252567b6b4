"""One file per architecture, each exporting ``Model`` and its ``VARIANTS`` table."""
