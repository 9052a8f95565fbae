"""Object detection as a set prediction: DETR's matching, loss and metric (Carion et al. 2020, arXiv 2005.12872)."""

import contextlib
import io
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss

from training import processes
from models.bdh_detector import Detections
from training.config import DetectionConfig, UserError
from training.data import Split, data_folder
from training.data.box_batches import BoxBatches
from training.data.boxes import SceneFiles, find_scenes
from training.experiment import Experiment
from training.metrics import METRICS, Items
from training.tasks import OneForward

CLASS_COST, L1_COST, GIOU_COST = 1.0, 5.0, 2.0  # of the matching; the loss weights its parts by the same
NO_OBJECT_WEIGHT = 0.1  # in the cross-entropy, as most queries find nothing
MAX_DETECTIONS = 100  # best answers of a class in an image, as COCO's metric counts


class Detection(OneForward):
    """Cross-entropy, L1 and GIoU of the queries matched to the boxes; mean average precision as COCO has it."""

    metric = METRICS["map"]
    samples, unit = "images", "img"
    shows_metric = False
    whole_batch = True  # a mean over boxes, not over images
    reads_values = True  # the matching is made on the host

    def __init__(self, train: DetectionConfig):
        self.train = train

    def open(self, experiment: Experiment) -> SceneFiles:
        model, options = experiment.model, experiment.options
        if options.eval_batch_size not in (None, self.train.batch_size):
            raise UserError(
                "detection validates in batches of --batch-size, because the loss depends on it: leave out "
                "--eval-batch-size"
            )
        files = find_scenes(data_folder(self.train.dataset, options.data_dir))
        for name, value in {"num_classes": len(files.class_names), "in_channels": 3}.items():
            if getattr(model, name) != value:
                raise UserError(
                    f"the data have {len(files.class_names)} classes and colour images, but the model has "
                    f"{name} = {getattr(model, name)}: set --{name.replace('_', '-')} {value}"
                )
        return files

    def load(self, source: SceneFiles, split: Split | None, experiment: Experiment, device: torch.device) -> BoxBatches:
        model, options = experiment.model, experiment.options
        if source.n_boxes > model.n_queries:
            print(
                f"note: an image has {source.n_boxes} boxes, but the model finds at most n_queries = "
                f"{model.n_queries}: --n-queries sets that"
            )
        return BoxBatches(source, self.train, model.img_size, self.train.batch_size, device, options.num_workers)

    def loss(self, outputs: Detections, targets: Tensor) -> Tensor:
        """The sum over decoder layers of cross-entropy + 5 L1 + 2 (1 - GIoU): DETR's equations 2 and 3.

        The cross-entropy is a mean over queries, weighted; the others are sums over boxes, divided by their number.
        targets: (B, M, 6) as in `data.boxes`. Waits for the device: matching runs on the CPU.
        """
        logits, boxes = (each.float() for each in outputs)
        truth = _box_mask(targets)
        matches = match(logits, boxes, targets, truth)
        no_object = logits.shape[-1] - 1
        classes = torch.full(logits.shape[:3], no_object, device=logits.device)
        found = targets[matches.image, matches.box]
        classes[matches.image, matches.layer, matches.query] = found[:, 0].long()
        weights = logits.new_ones(no_object + 1)
        weights[no_object] = NO_OBJECT_WEIGHT
        entropy = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), weights, reduction="sum")
        mine = boxes[matches.image, matches.layer, matches.query]
        l1 = (mine - found[:, 1:5]).abs().sum()
        giou = generalized_box_iou_loss(_corners(mine), _corners(found[:, 1:5]), reduction="sum")
        per_layer = weights[classes].sum() / logits.shape[1]  # equal in all layers, as their numbers of matches are
        entropy, distance = processes.total(torch.stack((entropy, L1_COST * l1 + GIOU_COST * giou)))
        weight, n_boxes = processes.total(torch.stack((per_layer, truth.sum().to(per_layer))))
        return CLASS_COST * entropy / weight.clamp(min=1e-6) + distance / n_boxes.clamp(min=1)

    def counts(self, outputs: Detections, targets: Tensor) -> dict[str, Tensor | Items]:
        """What was said and what is there, in validation and test.

        Not in training, whose images may be too many to keep all answers: the ratios are then None.
        """
        predicted = predictions(outputs)
        if torch.is_grad_enabled():
            predicted, targets = predicted[:0], targets[:0]
        return {"predicted": Items(predicted), "truth": Items(targets)}

    def ratios(self, sums: dict[str, Any]) -> dict[str, float | None]:
        return average_precision(sums["predicted"], sums["truth"])


class Matches(NamedTuple):
    """Which query of which layer answers for which box: (n,) int64 each."""

    image: Tensor
    layer: Tensor
    query: Tensor
    box: Tensor


def _box_mask(targets: Tensor) -> Tensor:
    """(B, M): which rows are boxes to be found, neither padding nor crowds."""
    return (targets[..., 0] >= 0) & (targets[..., 5] == 0)


def _corners(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size -> left, top, right, bottom."""
    return box_convert(boxes, "cxcywh", "xyxy")


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: Tensor, truth: Tensor) -> Matches:
    """The assignment of boxes to different queries with the least cost, for each image and layer.

    The cost is -p(class) + 5 L1 + 2 (-GIoU): DETR, section 3.1. Found by scipy's Hungarian algorithm.
    logits: (B, L, Q, n + 1), boxes: (B, L, Q, 4), targets: (B, M, 6), truth: (B, M).
    """
    rows: list[Tensor] = []
    for image, (p, said) in enumerate(zip(logits.softmax(-1), boxes, strict=True)):
        places = truth[image].nonzero()[:, 0]
        wanted = targets[image, places]
        class_cost = -p[..., wanted[:, 0].long()]  # (L, Q, n)
        l1 = torch.cdist(said, wanted[:, 1:5].expand(len(said), -1, -1), p=1)
        giou = generalized_box_iou(_corners(said).flatten(0, 1), _corners(wanted[:, 1:5])).unflatten(0, said.shape[:2])
        cost = CLASS_COST * class_cost + L1_COST * l1 - GIOU_COST * giou
        for layer, each in enumerate(cost.nan_to_num(0.0).cpu().numpy()):  # NaN: the loss will say so
            query, box = (torch.from_numpy(found) for found in linear_sum_assignment(each))
            where = torch.tensor([image, layer]).expand(len(query), 2)
            rows.append(torch.column_stack((where, query, places.cpu()[box])))
    found = torch.cat(rows) if rows else torch.empty(0, 4, dtype=torch.int64)
    return Matches(*found.to(logits.device).unbind(1))


@torch.no_grad()
def predictions(outputs: Detections) -> Tensor:
    """The last layer's answers, (B, Q, 6): most probable class, its probability, and the box as in `Detections`."""
    probabilities = outputs.logits[:, -1].float().softmax(-1)[..., :-1]
    score, label = probabilities.max(-1)
    return torch.cat((label[..., None], score[..., None], outputs.boxes[:, -1].float()), dim=-1)


def average_precision(predicted: Tensor, truth: Tensor) -> dict[str, float | None]:
    """COCO's AP, the mean over classes and the IoU thresholds 0.50, 0.55, ..., 0.95, and AP50, that of 0.50 alone.

    By pycocotools, the data set's own program. What lies in a crowd counts neither for nor against; None without boxes.
    predicted: (N, Q, 6) as `predictions` has it, truth: (N, M, 6) as in `data.boxes`.
    """
    from pycocotools.coco import COCO  # here: nothing else needs it
    from pycocotools.cocoeval import COCOeval

    is_box = truth[..., 0] >= 0
    if not _box_mask(truth).any():
        return {"map": None, "ap50": None}
    rows = [
        {"id": number, "image_id": image, "category_id": int(label), "bbox": box, "area": area, "iscrowd": int(crowd)}
        for number, (image, label, crowd, box, area) in enumerate(
            zip(
                is_box.nonzero()[:, 0].tolist(),
                truth[is_box][:, 0].tolist(),
                truth[is_box][:, 5].tolist(),
                _left_top_size(truth[is_box][:, 1:5]).tolist(),
                truth[is_box][:, 3:5].double().prod(-1).tolist(),
                strict=True,
            ),
            start=1,  # pycocotools takes the number 0 for no match
        )
    ]
    labels = sorted({row["category_id"] for row in rows})
    images = torch.arange(len(predicted))[:, None, None].expand(*predicted.shape[:2], 1)
    answers = torch.cat((images, _left_top_size(predicted[..., 2:]), predicted[..., [1, 0]].double()), dim=-1)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        gold = COCO()
        gold.dataset = {
            "images": [{"id": image} for image in range(len(truth))],
            "annotations": rows,
            "categories": [{"id": label} for label in labels],
        }
        gold.createIndex()
        evaluation = COCOeval(gold, gold.loadRes(answers.flatten(0, 1).numpy()), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, 0]  # (10 thresholds, 101 recalls, classes); -1: a class not there
    there = [each[each > -1] for each in (precision, precision[0])]
    return dict(zip(("map", "ap50"), (float(each.mean()) if each.size else None for each in there), strict=True))


def _left_top_size(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size -> left, top, width, height in float64."""
    return box_convert(boxes.double(), "cxcywh", "xywh")
