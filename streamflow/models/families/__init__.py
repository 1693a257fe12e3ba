"""One file for each family of rectified-flow models (`streamflow.models.FAMILIES`)."""
