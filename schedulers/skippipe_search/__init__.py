"""SkipPipe's inner problem: which nodes each microbatch visits, and when. `schedulers/skippipe.py` is the door."""
