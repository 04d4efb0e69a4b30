"""What the quickstart and the tests run, apart from the core: a small world of sums and manners, and the warm-up that
makes a small model speak of it."""
