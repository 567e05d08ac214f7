"""One resident student that serves requests: images of any style, solver and number of steps share a batch."""
