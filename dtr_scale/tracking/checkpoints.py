"""Show each kept checkpoint as a model in MLflow. Its files stay where they are."""

from collections.abc import Mapping

from dtr_scale.tracking.mlflow import Server

STEP, URL = "dtr_scale.step", "checkpoint"
_REMOVED = "checkpoint.removed"


class CheckpointModels:
    """The models of a run, one for each of its checkpoints."""

    def __init__(
        self,
        server: Server,
        experiment_id: str,
        run_id: str,
        name: str,
        tags: Mapping[str, str],
    ) -> None:
        self._server = server
        self._experiment_id = experiment_id
        self._run_id = run_id
        self._name = name
        self._tags = tags
        self._models: dict[int, str] = {}
        self._kept: Mapping[int, str] | None = None

    def send(self, kept: Mapping[int, str]) -> None:
        """Let there be a model for each checkpoint, given their URLs by step, and for no other.

        One that was evaluated before its checkpoint was removed stays, with a tag that says so.
        """
        # Called once a minute and after every save: mostly there is nothing to ask the server.
        if kept == self._kept:
            return
        found = self._server.models(self._experiment_id, self._run_id)
        by_step = {int(model.tags[STEP]): model for model in found if STEP in model.tags}
        self._models = {step: model.model_id for step, model in by_step.items()}
        for step in sorted(kept.keys() - by_step.keys()):
            self._models[step] = self._server.create_model(
                self._experiment_id,
                self._run_id,
                f"{self._name}-step_{step:08d}",
                step=step,
                tags={STEP: str(step), URL: kept[step], **self._tags},
            )
        for step in by_step.keys() - kept.keys():
            model = by_step[step]
            if not model.metrics:
                self._server.delete_model(model.model_id)
                del self._models[step]
            elif _REMOVED not in model.tags:
                self._server.tag_model(model.model_id, {_REMOVED: "true"})
        self._kept = dict(kept)

    def at(self, step: int) -> str | None:
        """Return the id of a step's model, None if it has no checkpoint."""
        return self._models.get(step)
