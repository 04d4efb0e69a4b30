"""Faults of a vLLM worker, for test_sync_faults.py. vLLM's server finds it on PYTHONPATH: --worker-extension-cls."""

from __future__ import annotations

from typing import Any


class FaultyWorker:
    """Added to vLLM's worker class; POST /collective_rpc calls it."""

    model_runner: Any
    processed = 0

    def plant(self, module_name: str, fault: str) -> None:
        """From now on the module's weights are wrong after they were processed. stale: its kernel has kept the copy
        that it had. kept: experts have kept what they had when this was planted. nan: its kernel answers NaN. changed:
        all its parameters have their signs turned. unpacked: they are as the checkpoint has them, and not as the kernel
        wants them. counted: they are right. none: no more. It is counted how often the module is processed."""
        module = self.model_runner.model.get_submodule(module_name)
        method = module.quant_method
        method.__dict__.pop("process_weights_after_loading", None)
        process = method.process_weights_after_loading
        if fault == "none":
            return

        self.processed = 0
        had = {name: parameter.data.clone() for name, parameter in module.named_parameters() if name.startswith("w")}

        def faulty(layer: Any) -> None:
            self.processed += 1
            before = getattr(layer, "cpu_linear", None)
            loaded = {name: parameter.data.clone() for name, parameter in layer.named_parameters()}
            process(layer)
            for name, parameter in layer.named_parameters():
                if fault == "changed":
                    parameter.data.neg_()
                elif fault == "unpacked":
                    parameter.data.copy_(loaded[name])
                elif fault == "kept" and name in had:
                    parameter.data.copy_(had[name])
            if fault == "stale":
                layer.cpu_linear = before
            elif fault == "nan":
                kernel = layer.cpu_linear
                layer.cpu_linear = lambda *arguments: kernel(*arguments) * float("nan")

        method.process_weights_after_loading = faulty

    def change(self, module_name: str) -> None:
        """Turn the signs of the module's parameters, now."""
        for parameter in self.model_runner.model.get_submodule(module_name).parameters():
            parameter.data.neg_()

    def times_processed(self) -> int:
        """Since the last `plant` but of none."""
        return self.processed
