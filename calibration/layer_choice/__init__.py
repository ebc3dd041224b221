"""Layer choice by measurement: which linears a budget is best spent on (``fp4trt search``)."""
