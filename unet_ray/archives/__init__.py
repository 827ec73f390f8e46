"""A folder, tar, zip, Parquet file or catalogue, to frame references, to bytes."""
