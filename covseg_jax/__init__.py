"""covseg_jax: COVID-19 lesion segmentation in chest CT without human masks."""
