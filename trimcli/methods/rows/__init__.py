"""Row allocation: how many weights each row of a matrix loses."""
