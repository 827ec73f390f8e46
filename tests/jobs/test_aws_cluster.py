"""`ray up cluster.yaml` by Ray's own launcher and node provider, with the policies of jobs/README.md, on moto's AWS.

moto enforces which actions a profile may do, but neither `iam:PassRole` nor `ssm:GetParameters`; its instances are no
machines. In place of `ssh` and `rsync` stand programs that write down what they are asked for.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import fsspec
import pytest
import yaml
from s3_server import ask, reach, run_server
from test_readme import blocks

from unet_ray import storage
from unet_ray.chaos.trials import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

boto3 = pytest.importorskip("boto3")

ROOT = Path(__file__).parents[2]
REGION = yaml.safe_load((ROOT / "cluster.yaml").read_text())["provider"]["region"]
HEAD, NODE, PERSON, OWNER = "unet-ray-head", "unet-ray-node", "person", "owner"
POLICIES = {policy["Statement"][0]["Sid"]: policy for policy in map(json.loads, blocks("json", "jobs/README.md"))}
POLICIES["All"] = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
ROLES = {HEAD: ("Head", "Data"), NODE: ("Data",), PERSON: ("Head", "RayUp"), OWNER: ("All",)}
"""Which policies each has. Who runs `ray up` and who owns the account are no machines; on moto they take roles, too."""
TRUST = {"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "sts:AssumeRole"}

WRITE_DOWN = """#!/bin/sh
printf '%s\\n' "$*" >> "$0.log"
for last; do before=$argument; argument=$last; done
case $argument in *:~/ray_bootstrap_*) cp "$before" "$HOME/${argument#*:~/}";; esac
"""
"""`ssh` and `rsync`; of the files that go to the head, the second keeps what the head's autoscaler reads."""


@dataclass(frozen=True, eq=False)
class Aws:
    """moto, and the credentials of each role."""

    endpoint: str
    credentials: dict[str, dict[str, str]]

    def client(self, service: str, **credentials: str) -> Any:
        return boto3.session.Session(**credentials).client(service, REGION, endpoint_url=self.endpoint)

    @functools.cache  # noqa: B019  # a client takes a third of a second
    def owner(self, service: str) -> Any:
        """A client that may do everything, once moto refuses what is not allowed."""
        names = {name.removeprefix("AWS_").lower(): value for name, value in self.credentials[OWNER].items()}
        return self.client(service, **{f"aws_{name}": value for name, value in names.items()})

    def enforce_from(self, n_requests: str) -> None:
        """From so many requests on, moto enforces its IAM."""
        url, plain = f"{self.endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, n_requests.encode(), plain)).close()

    def instances(self) -> dict[str, dict[str, Any]]:
        """Returns those that run, by their node type."""
        reservations = self.owner("ec2").describe_instances()["Reservations"]
        instances = [instance for reservation in reservations for instance in reservation["Instances"]]
        running = [one for one in instances if one["State"]["Name"] in ("pending", "running")]
        return {_tags(one)["ray-user-node-type"]: one for one in running}


def set_policies(iam: Any, role: str, *, without: str | None = None) -> None:
    """Gives a role its policies, all but one action."""
    for policy in ROLES[role]:
        statements = [
            {**one, "Action": [action for action in _actions(one) if action != without]}
            for one in POLICIES[policy]["Statement"]
        ]
        document = json.dumps({**POLICIES[policy], "Statement": [one for one in statements if one["Action"]]})
        iam.put_role_policy(RoleName=role, PolicyName=policy, PolicyDocument=document)


def _actions(statement: Mapping[str, Any]) -> list[str]:
    actions = statement["Action"]
    return [actions] if isinstance(actions, str) else actions


def _tags(instance: Mapping[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in instance["Tags"]}


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aws]:
    recording = tmp_path_factory.mktemp("aws") / "recording"
    with pytest.MonkeyPatch.context() as patch, run_server(str(recording)) as server, reach(server, patch):
        ask(server, "reset")
        aws = Aws(server, {})
        iam, trust = aws.client("iam"), json.dumps({"Version": "2012-10-17", "Statement": [TRUST]})
        for role in ROLES:
            arn = iam.create_role(RoleName=role, AssumeRolePolicyDocument=trust)["Role"]["Arn"]
            set_policies(iam, role)
            if role in (HEAD, NODE):
                iam.create_instance_profile(InstanceProfileName=role)
                iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)
            given = aws.client("sts").assume_role(RoleArn=arn, RoleSessionName=role)["Credentials"]
            variables = {
                "AccessKeyId": "AWS_ACCESS_KEY_ID",
                "SecretAccessKey": "AWS_SECRET_ACCESS_KEY",
                "SessionToken": "AWS_SESSION_TOKEN",
            }
            aws.credentials[role] = {variable: given[name] for name, variable in variables.items()}
        aws.client("s3").create_bucket(Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": REGION})
        aws.enforce_from("0")
        yield aws
        aws.enforce_from("inf")
        ask(server, "reset")


@dataclass
class Up:
    """What `ray up` has left."""

    folder: Path
    requests: list[dict[str, Any]]
    """All that were made for it."""

    def commands(self) -> list[str]:
        """Returns the commands that the head was given, in order."""
        return (self.folder / "bin" / "ssh.log").read_text().splitlines()

    @property
    def home(self) -> Path:
        """Where the head has its configuration, and its key to the nodes."""
        return self.folder / "home"


@pytest.fixture(scope="module")
def up(aws: Aws, tmp_path_factory: pytest.TempPathFactory) -> Up:
    folder = tmp_path_factory.mktemp("person")
    (folder / "home" / ".ray").mkdir(parents=True)
    (folder / "home" / ".ray" / "auth_token").write_text("a token")
    (folder / "bin").mkdir()
    for name in ("ssh", "rsync"):
        (folder / "bin" / name).write_text(WRITE_DOWN)
        (folder / "bin" / name).chmod(0o755)
    environment = {
        **os.environ,
        **aws.credentials[PERSON],
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder),
        "PATH": os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = ["ray", "up", "--yes", "--no-config-cache", "cluster.yaml"]
    for what in ("reset", "start"):
        ask(aws.endpoint, f"recorder/{what}-recording")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    ask(aws.endpoint, "recorder/stop-recording")
    assert done.returncode == 0, done.stdout + done.stderr
    with urllib.request.urlopen(f"{aws.endpoint}/moto-api/recorder/download-recording") as answer:
        return Up(folder, [json.loads(line) for line in answer.read().splitlines()])


@contextmanager
def on(aws: Aws, role: str, up: Up) -> Iterator[None]:
    """While the block runs, this process has a role's credentials, as the machines with its profile have."""
    from ray.autoscaler._private.aws import utils

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**aws.credentials[role], "HOME": str(up.home)}.items():
            patch.setenv(name, value)
        patch.setattr(boto3, "DEFAULT_SESSION", None)
        caches = (utils.resource_cache.cache_clear, utils.client_cache.cache_clear)
        forget = (*caches, fsspec.get_filesystem_class("s3").clear_instance_cache)
        for clear in forget:
            clear()
        yield
        for clear in forget:
            clear()


class Autoscaler:
    """What Ray's autoscaler on the head starts, marks, lists and ends nodes with."""

    def __init__(self) -> None:
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
        from ray.autoscaler.v2.instance_manager.config import FileConfigReader
        from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter

        reader = FileConfigReader(str(Path("~/ray_bootstrap_config.yaml").expanduser()))
        config = reader.get_cached_autoscaling_config()
        self.types = config.get_config("available_node_types")
        self._nodes = NodeProviderAdapter(AWSNodeProvider(config.get_provider_config(), "unet-ray"), reader)
        self._errors: list[Exception] = []

    def launch(self, *kinds: str) -> None:
        self._nodes.launch(dict.fromkeys(kinds, 1), "request")

    def mark(self, instance: str) -> None:
        """As Ray's installer does before and after it sets a node up."""
        self._nodes.v1_provider.set_node_tags(instance, {"ray-node-status": "up-to-date"})

    def list(self) -> list[str]:
        return [node.node_type for node in self._nodes.get_non_terminated().values()]

    def terminate(self, *instances: str) -> None:
        self._nodes.terminate(list(instances), "request")

    def refusals(self) -> list[str]:
        """Returns what went wrong in Ray's threads so far."""
        self._errors += self._nodes.poll_errors()
        return ["; ".join(map(str, _causes(error))) for error in self._errors]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def test_ray_up_launches_a_head_that_has_boto3_beside_s3fs(aws: Aws, up: Up) -> None:
    head = aws.instances()["head"]
    assert head["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/{HEAD}")
    assert head["InstanceType"] == "m6i.2xlarge" and "InstanceLifecycle" not in head
    boto, s3fs, start = (
        [line for line in up.commands() if text in line] for text in ("boto3", "unet_ray[s3]", "ray start --head")
    )
    assert len(boto) == len(s3fs) == len(start) == 1
    assert up.commands().index(s3fs[0]) < up.commands().index(boto[0]) < up.commands().index(start[0])
    assert "boto3<=$(~/env/bin/python -c" in boto[0]  # Ray's own line would be `pip install boto3>=1.4.8`
    assert "RAY_enable_autoscaler_v2=1" in start[0], "which `--device auto` asks what can never come"


def test_whoever_runs_ray_up_needs_each_right_on_ec2_that_the_policy_has(aws: Aws, up: Up) -> None:
    bodies = (base64.b64decode(request["body"]).decode() for request in up.requests)
    used = {f"ec2:{action}" for body in bodies for action in re.findall(r"^Action=(\w+)", body)}
    allowed = {action for policy in ROLES[PERSON] for one in POLICIES[policy]["Statement"] for action in _actions(one)}
    assert used <= allowed
    # `ray down` ends nodes.
    assert {action for action in allowed if action.startswith("ec2:")} - used == {"ec2:TerminateInstances"}


def test_the_head_launches_a_gpu_and_a_cpu_worker_each_with_the_profile_of_nodes(aws: Aws, up: Up) -> None:
    with on(aws, HEAD, up):
        head = Autoscaler()
        gpu, cpu = (head.types[kind]["resources"] for kind in ("gpu_worker", "cpu_worker"))
        assert (gpu["GPU"], gpu["CPU"], cpu.get("GPU"), cpu["CPU"]) == (1, 16, None, 32)
        head.launch("gpu_worker", "cpu_worker")
        assert wait_until(lambda: len(aws.instances()) == 3 or head.refusals(), timeout_s=120)
        assert head.refusals() == [] and sorted(head.list()) == ["cpu_worker", "gpu_worker", "head"]
        instances = aws.instances()
        for kind, instance_type in (("gpu_worker", "g6.4xlarge"), ("cpu_worker", "c7i.8xlarge")):
            worker = instances[kind]
            assert worker["InstanceType"] == instance_type and worker["InstanceLifecycle"] == "spot"
            assert worker["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/{NODE}")
            assert worker["ImageId"] == instances["head"]["ImageId"]
            assert worker["SecurityGroups"] == instances["head"]["SecurityGroups"]
            head.mark(worker["InstanceId"])
        head.terminate(*(instances[kind]["InstanceId"] for kind in ("gpu_worker", "cpu_worker")))
        assert wait_until(lambda: list(aws.instances()) == ["head"] or head.refusals(), timeout_s=120)
        assert head.refusals() == []


EC2_ACTIONS = [action for one in POLICIES["Head"]["Statement"] for action in _actions(one) if action.startswith("ec2:")]


@pytest.mark.parametrize("missing", EC2_ACTIONS)
def test_a_head_without_one_of_its_rights_on_ec2_is_refused(aws: Aws, up: Up, missing: str) -> None:
    """So the policy has no right that is not needed, and moto does enforce it."""
    set_policies(aws.owner("iam"), HEAD, without=missing)
    try:
        with on(aws, HEAD, up):
            assert f"perform: {missing}" in at_work(Autoscaler(), aws)
    finally:
        set_policies(aws.owner("iam"), HEAD)
        if worker := aws.instances().get("cpu_worker"):
            aws.owner("ec2").terminate_instances(InstanceIds=[worker["InstanceId"]])


def at_work(head: Autoscaler, aws: Aws) -> str:
    """Starts a worker, lists the nodes, marks the worker and ends it; returns what was refused."""
    head.launch("cpu_worker")
    assert wait_until(lambda: "cpu_worker" in aws.instances() or head.refusals(), timeout_s=120)
    if head.refusals():
        return "\n".join(head.refusals())
    worker = aws.instances()["cpu_worker"]["InstanceId"]
    try:
        head.list()
        head.mark(worker)
    except (click.ClickException, aws.owner("ec2").exceptions.ClientError) as error:
        return "; ".join(map(str, _causes(error)))
    head.terminate(worker)
    assert wait_until(lambda: "cpu_worker" not in aws.instances() or head.refusals(), timeout_s=120)
    return "\n".join(head.refusals())


def test_a_node_may_read_and_write_the_data_and_start_nothing(aws: Aws, up: Up) -> None:
    with on(aws, NODE, up):
        uri = "s3://bucket/labels/_work/part"
        storage.write_whole(uri, b"rows")
        assert storage.read_bytes(uri) == b"rows"
        assert [file.path for file in storage.list_folder("s3://bucket/labels")] == ["_work/part"]
        assert not storage.put_if_absent(uri, b"others")
        storage.delete(uri)
        assert not storage.exists(uri)
        assert "perform: ec2:RunInstances" in at_work(Autoscaler(), aws)
    assert list(aws.instances()) == ["head"]
