"""What pytest-benchmark saves of the machine with the times of kernel_times.py; `load`: other work while it ran."""

import os


def pytest_benchmark_update_machine_info(config, machine_info):
    cpu, python = machine_info["cpu"].get("brand_raw", machine_info["machine"]), machine_info["python_version"]
    machine_info.clear()
    machine_info.update(cpu=cpu, python=python, load=round(os.getloadavg()[0], 1))


def pytest_benchmark_update_commit_info(config, commit_info):
    for name in set(commit_info) - {"id", "time"}:
        del commit_info[name]
