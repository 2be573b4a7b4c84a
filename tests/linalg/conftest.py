import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Matrices of a few dozen rows: a second thread would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
