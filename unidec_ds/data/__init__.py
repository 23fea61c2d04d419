"""From raw files to the texts, positives and label pool of one step."""
