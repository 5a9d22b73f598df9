"""Files to rows, rows to tokens with their mask, tokens to batches."""
