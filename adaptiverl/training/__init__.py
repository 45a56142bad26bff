"""What joins the packages into a run: the only place, beside train.py, that knows them all."""
