//! The stand-in for an API server, driven by `kubectl` as people drive it.

use std::{fs, path::PathBuf, process::Output, time::Duration};

use anyhow::{Context as _, Result, ensure};
use integration::apiserver::{Options, Standin};
use tempfile::TempDir;
use tokio::process::Command;

/// Longer than any of these commands takes.
const COMMAND_MAX: Duration = Duration::from_secs(60);

struct Kubectl {
    standin: Standin,
    folder: TempDir,
}

impl Kubectl {
    async fn new() -> Result<Self> {
        let standin = Standin::start(Options::default()).await?;
        let folder = TempDir::new()?;
        fs::write(folder.path().join("admin"), standin.kubeconfig())?;
        Ok(Self { standin, folder })
    }

    fn file(&self, name: &str, text: &str) -> Result<String> {
        let path = self.path(name);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&path, text)?;
        Ok(path.display().to_string())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn run_as(&self, who: &str, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new("kubectl");
        command
            .env("HOME", self.folder.path())
            .env("KUBECONFIG", self.path(who))
            .args(["--cache-dir", &self.path("cache").display().to_string()])
            .args(arguments)
            .kill_on_drop(true);
        let done = tokio::time::timeout(COMMAND_MAX, command.output()).await;
        done.with_context(|| format!("kubectl {arguments:?} does not end"))?
            .context("run kubectl (`cargo xtask test` gets one)")
    }

    /// What a command that succeeds says.
    async fn ok(&self, arguments: &[&str]) -> Result<String> {
        let output = self.run_as("admin", arguments).await?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "kubectl {arguments:?}: {said}{errors}"
        );
        Ok(format!("{said}{errors}"))
    }

    /// What a command that is refused says.
    async fn refused(&self, arguments: &[&str]) -> Result<String> {
        let output = self.run_as("admin", arguments).await?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            !output.status.success(),
            "kubectl {arguments:?} is not refused"
        );
        Ok(said)
    }
}

fn contains(said: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(said.contains(word), "no {word:?} in:\n{said}");
    }
    Ok(())
}

const DEFINITION: &str = r#"
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: gadgets.example.dev}
spec:
  group: example.dev
  scope: Namespaced
  names: {plural: gadgets, singular: gadget, kind: Gadget, shortNames: [gd], categories: [mesh]}
  versions:
  - name: v1alpha1
    served: true
    storage: true
    subresources: {status: {}}
    additionalPrinterColumns:
    - {name: Site, type: string, jsonPath: .spec.site}
    - {name: Mtu, type: integer, jsonPath: .spec.mtu, priority: 1}
    schema:
      openAPIV3Schema:
        type: object
        description: A gadget at a site.
        required: [spec]
        properties:
          spec:
            type: object
            description: What the gadget is.
            required: [site]
            properties:
              site: {type: string, description: Where it stands., maxLength: 63}
              mtu: {type: integer, default: 1280, minimum: 576}
          status: {type: object, properties: {seen: {type: string}}}
"#;

const WORKLOADS: &str = r"
apiVersion: v1
kind: ServiceAccount
metadata: {name: agent}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: agent}
rules:
- {apiGroups: ['coordination.k8s.io'], resources: [leases], verbs: [get, create, update]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: agent}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: agent}
subjects: [{kind: ServiceAccount, name: agent, namespace: mesh}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: agent}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent}
spec:
  selector: {matchLabels: {app: agent}}
  template:
    metadata: {labels: {app: agent}}
    spec:
      serviceAccountName: agent
      containers:
      - name: agent
        image: agent:1
        ports: [{name: http, containerPort: 8080}]
        resources: {limits: {memory: 64Mi}}
        volumeMounts: [{name: state, mountPath: /var/lib/agent}]
      volumes: [{name: state, hostPath: {path: /var/lib/agent, type: DirectoryOrCreate}}]
";

async fn with_definition() -> Result<Kubectl> {
    let kubectl = Kubectl::new().await?;
    let file = kubectl.file("crd.yaml", DEFINITION)?;
    contains(&kubectl.ok(&["apply", "-f", &file]).await?, &["created"])?;
    let wait = [
        "wait",
        "--for=condition=Established",
        "--timeout=10s",
        "-f",
        &file,
    ];
    contains(&kubectl.ok(&wait).await?, &["condition met"])?;
    Ok(kubectl)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_is_applied_by_kustomize_and_then_unchanged() -> Result<()> {
    let kubectl = Kubectl::new().await?;
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: mesh}\n";
    kubectl.file("base/namespace.yaml", namespace)?;
    kubectl.file("base/workloads.yaml", WORKLOADS)?;
    kubectl.file("base/crd.yaml", DEFINITION)?;
    kubectl.file(
        "base/kustomization.yaml",
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: mesh\n\
         resources: [namespace.yaml, workloads.yaml, crd.yaml]\n",
    )?;
    let folder = kubectl.path("base").display().to_string();
    let said = kubectl.ok(&["apply", "-k", &folder]).await?;
    contains(
        &said,
        &["namespace/mesh created", "daemonset.apps/agent created"],
    )?;
    let again = kubectl.ok(&["apply", "-k", &folder]).await?;
    ensure!(
        !again.contains("configured") && !again.contains("created"),
        "{again}"
    );
    contains(&again, &["service/web unchanged"])?;
    let server = [
        "apply",
        "--server-side",
        "--field-manager=setup",
        "-k",
        &folder,
    ];
    contains(&kubectl.ok(&server).await?, &["serverside-applied"])?;
    kubectl.ok(&["diff", "-k", &folder]).await?;
    let get = ["get", "-n", "mesh", "svc,ds,sa", "-o", "wide"];
    contains(
        &kubectl.ok(&get).await?,
        &["service/web", "daemonset.apps/agent", "10.9"],
    )?;
    kubectl
        .ok(&["delete", "-k", &folder, "--timeout=20s"])
        .await?;
    contains(
        &kubectl.refused(&["get", "namespace", "mesh"]).await?,
        &["NotFound"],
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn custom_resources_print_explain_and_are_validated() -> Result<()> {
    let kubectl = with_definition().await?;
    let gadget = |spec: &str| {
        format!(
            "apiVersion: example.dev/v1alpha1\nkind: Gadget\nmetadata: {{name: one}}\nspec: {spec}\n"
        )
    };
    let good = kubectl.file("good.yaml", &gadget("{site: here}"))?;
    kubectl.ok(&["apply", "-f", &good]).await?;
    let table = kubectl.ok(&["get", "gd"]).await?;
    contains(&table, &["NAME", "SITE", "one", "here"])?;
    ensure!(!table.contains("MTU"), "{table}");
    contains(
        &kubectl.ok(&["get", "gd", "-o", "wide"]).await?,
        &["MTU", "1280"],
    )?;
    contains(&kubectl.ok(&["get", "mesh"]).await?, &["one"])?;
    let explained = kubectl.ok(&["explain", "gadget.spec"]).await?;
    contains(
        &explained,
        &[
            "KIND:",
            "Gadget",
            "Where it stands.",
            "-required-",
            "<integer>",
        ],
    )?;
    contains(
        &kubectl.ok(&["explain", "service.spec.ports"]).await?,
        &["targetPort", "<IntOrString>"],
    )?;
    for (spec, said) in [
        ("{site: here, sight: 1}", "unknown field \"spec.sight\""),
        ("{}", "spec.site"),
        ("{site: here, mtu: 5}", "greater than or equal to 576"),
    ] {
        let bad = kubectl.file("bad.yaml", &gadget(spec))?;
        contains(&kubectl.refused(&["apply", "-f", &bad]).await?, &[said])?;
    }
    let warned = kubectl.file("warned.yaml", &gadget("{site: here, sight: 1}"))?;
    let said = kubectl
        .ok(&["apply", "--validate=warn", "-f", &warned])
        .await?;
    contains(&said, &["Warning: unknown field"])?;
    let dry = ["delete", "gd", "one", "--dry-run=server"];
    contains(&kubectl.ok(&dry).await?, &["dry run"])?;
    contains(&kubectl.ok(&["delete", "gd", "one"]).await?, &["deleted"])?;
    contains(
        &kubectl.ok(&["api-resources"]).await?,
        &["gadgets", "example.dev/v1alpha1"],
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn server_side_apply_tells_who_owns_what() -> Result<()> {
    let kubectl = Kubectl::new().await?;
    let map = |value: &str| {
        format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: m}}\ndata: {{k: {value}}}\n")
    };
    let (one, two) = (
        kubectl.file("1.yaml", &map("a"))?,
        kubectl.file("2.yaml", &map("b"))?,
    );
    kubectl
        .ok(&["apply", "--server-side", "--field-manager=one", "-f", &one])
        .await?;
    let apply = ["apply", "--server-side", "--field-manager=two", "-f", &two];
    let said = kubectl.refused(&apply).await?;
    contains(&said, &["conflict with \"one\"", ".data.k"])?;
    let forced = [&apply[..], &["--force-conflicts"]].concat();
    contains(&kubectl.ok(&forced).await?, &["serverside-applied"])?;
    let fields = kubectl
        .ok(&["get", "cm", "m", "-o", "yaml", "--show-managed-fields"])
        .await?;
    contains(&fields, &["manager: two", "k: b"])?;
    ensure!(!fields.contains("manager: one"), "{fields}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_are_labelled_patched_waited_for_and_watched() -> Result<()> {
    let kubectl = Kubectl::new().await?;
    kubectl.ok(&["create", "namespace", "mesh"]).await?;
    let file = kubectl.file("workloads.yaml", WORKLOADS)?;
    kubectl.ok(&["apply", "-n", "mesh", "-f", &file]).await?;
    kubectl
        .ok(&["label", "-n", "mesh", "svc", "web", "tier=front"])
        .await?;
    kubectl
        .ok(&["annotate", "-n", "mesh", "svc", "web", "a/b=c"])
        .await?;
    contains(
        &kubectl
            .ok(&["get", "-A", "svc", "-l", "tier=front"])
            .await?,
        &["web"],
    )?;
    let image =
        r#"{"spec":{"template":{"spec":{"containers":[{"name":"agent","image":"agent:2"}]}}}}"#;
    let json = r#"[{"op":"replace","path":"/spec/revisionHistoryLimit","value":3}]"#;
    for patch in [
        &["--type=strategic", "-p", image][..],
        &["--type=json", "-p", json],
        &["--type=merge", "-p", r#"{"metadata":{"labels":{"x":"y"}}}"#],
    ] {
        kubectl
            .ok(&[&["patch", "-n", "mesh", "ds", "agent"], patch].concat())
            .await?;
    }
    let path = "{.metadata.generation} {.spec.revisionHistoryLimit} \
                {.spec.template.spec.containers[0].image} {.spec.template.spec.containers[0].name}";
    let path = format!("jsonpath={path}");
    let said = kubectl
        .ok(&["get", "-n", "mesh", "ds", "agent", "-o", &path])
        .await?;
    ensure!(said == "3 3 agent:2 agent", "{said}");
    let bad = r#"{"spec":{"selector":{"matchLabels":{"app":"other"}}}}"#;
    let said = kubectl
        .refused(&["patch", "-n", "mesh", "ds", "agent", "-p", bad])
        .await?;
    contains(&said, &["field is immutable"])?;
    contains(
        &kubectl
            .ok(&["describe", "-n", "mesh", "svc", "web"])
            .await?,
        &["80/TCP"],
    )?;
    let watch = [
        "get",
        "-n",
        "mesh",
        "svc",
        "--watch",
        "--request-timeout=1s",
    ];
    let watched = kubectl.run_as("admin", &watch).await?;
    contains(&String::from_utf8_lossy(&watched.stdout), &["web"])?;
    kubectl
        .ok(&["delete", "-n", "mesh", "svc", "web", "--wait=false"])
        .await?;
    let gone = [
        "wait",
        "-n",
        "mesh",
        "--for=delete",
        "svc/web",
        "--timeout=10s",
    ];
    kubectl.ok(&gone).await?;
    let said = kubectl
        .refused(&["get", "pods", "--field-selector=spec.image=x"])
        .await?;
    contains(&said, &["field label not supported"])?;
    contains(
        &kubectl
            .refused(&["create", "cm", "m", "-n", "nowhere"])
            .await?,
        &["not found"],
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_are_what_roles_give() -> Result<()> {
    let kubectl = Kubectl::new().await?;
    kubectl.ok(&["create", "namespace", "mesh"]).await?;
    let file = kubectl.file("workloads.yaml", WORKLOADS)?;
    kubectl.ok(&["apply", "-n", "mesh", "-f", &file]).await?;
    let token = kubectl
        .ok(&["create", "token", "agent", "-n", "mesh", "--duration=10m"])
        .await?;
    let config = kubectl.standin.kubeconfig_with_token(token.trim());
    kubectl.file("agent", &config)?;
    for (action, expected) in [
        (&["get", "leases"][..], true),
        (&["create", "leases.coordination.k8s.io"], true),
        (&["delete", "leases"], false),
        (&["get", "secrets"], false),
    ] {
        let command = [&["auth", "can-i", "-n", "mesh"], action].concat();
        let said = kubectl.run_as("agent", &command).await?;
        ensure!(said.status.success() == expected, "{action:?}: {said:?}");
    }
    let agent = "--as=system:serviceaccount:mesh:agent";
    let said = kubectl
        .run_as("admin", &["auth", "can-i", "list", "pods", agent])
        .await?;
    ensure!(!said.status.success(), "{said:?}");
    let said = kubectl
        .run_as("agent", &["get", "nodes", "--as=kubernetes-admin"])
        .await?;
    contains(
        &String::from_utf8_lossy(&said.stderr),
        &["cannot impersonate resource"],
    )?;
    let said = kubectl
        .run_as("agent", &["get", "secrets", "-n", "mesh"])
        .await?;
    contains(
        &String::from_utf8_lossy(&said.stderr),
        &["Forbidden", "cannot list resource \"secrets\""],
    )?;
    contains(
        &kubectl.ok(&["auth", "whoami"]).await?,
        &["kubernetes-admin"],
    )?;
    kubectl.file("nobody", &kubectl.standin.kubeconfig_with_token("nonsense"))?;
    let said = kubectl.run_as("nobody", &["get", "nodes"]).await?;
    ensure!(!said.status.success());
    Ok(())
}

/// The folders that people apply.
const MANIFESTS: [&str; 2] = ["deploy/kubernetes", "deploy/kubernetes/cni"];

#[tokio::test(flavor = "multi_thread")]
async fn the_projects_own_manifests_are_taken_and_taken_again() -> Result<()> {
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    for folder in MANIFESTS {
        let kubectl = Kubectl::new().await?;
        let folder = root.join(folder).display().to_string();
        let said = kubectl.ok(&["apply", "-k", &folder]).await?;
        ensure!(!said.contains("Warning"), "{said}");
        let again = kubectl.ok(&["apply", "-k", &folder]).await?;
        // The selector of a disruption budget is replaced as a whole (`patchStrategy` of policy/v1), so `kubectl` always
        // sends it again. Nothing changes by that.
        let mut changed = again.lines().filter(|line| !line.ends_with("unchanged"));
        let only_budgets = changed.all(|line| line.starts_with("poddisruptionbudget"));
        ensure!(only_budgets, "{again}");
        kubectl.ok(&["diff", "-k", &folder]).await?;
        let delete = [
            "delete",
            "--ignore-not-found",
            "-k",
            &folder,
            "--timeout=20s",
        ];
        kubectl.ok(&delete).await?;
        for _ in 0..2 {
            let said = kubectl
                .ok(&["apply", "--server-side", "-k", &folder])
                .await?;
            ensure!(!said.contains("Warning"), "{said}");
        }
        kubectl.ok(&delete).await?;
    }
    Ok(())
}
