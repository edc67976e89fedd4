# Serves a bundle: docker build -t fullrank . && docker run -p 8000:8000 -v "$PWD/runs/demo/bundle:/bundle:ro" fullrank
FROM python:3.11-slim
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /fullrank

# PyTorch changes less often than the code. Its CPU build comes from an index of its own; what it needs, from PyPI below.
COPY constraints.txt .
RUN pip install --no-deps -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch

COPY pyproject.toml README.md LICENSE ./
COPY recipes recipes
COPY src src
RUN pip install -c constraints.txt ".[serve]"

RUN useradd --create-home --uid 10001 fullrank
USER fullrank
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["fullrank"]
CMD ["serve", "/bundle", "--host", "0.0.0.0"]
