//! The harness of the end-to-end tests: throwaway servers, mounts and repositories that clean up after themselves.
