"""One forward step on this rank: plan in, result out."""
