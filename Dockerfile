# covseg on a CPU: predicts with the model that comes with it, and needs no network to run.
# docs/docker.md says how to build and run it.
FROM python:3.11-slim

COPY covseg_jax /source/covseg_jax
COPY pyproject.toml README.md LICENSE /source/
RUN pip install --no-cache-dir '/source[dicom]' && rm -r /source

RUN useradd --create-home covseg
USER covseg
WORKDIR /home/covseg
ENTRYPOINT ["covseg"]
