// Kubernetes: a node of a cluster, by the pod in which the agent runs there. The
// cluster says so in a projected service-account token, which is bound to that
// pod and names its node; the token is verified by the keys of the cluster's
// issuer or by its API server (k8sreview.go). A new one is there before the old
// one ends, so such a node attests again as often as it has to.

package attest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/oidc"
)

// K8s is the kind of evidence in an agent's record.
const K8s = "k8s"

const (
	maxK8sToken = 16 << 10
	// accountPrefix begins the name of a service account as a user.
	accountPrefix = "system:serviceaccount:"
)

// Pod is what a verified token says of the pod that it is bound to.
type Pod struct {
	Namespace, Account string
	Name, UID          string
	Node, NodeUID      string
}

// TokenVerifier verifies the tokens of one cluster.
type TokenVerifier interface {
	// Pod returns whose token it is, of at most 16 KiB. What is not there is empty.
	// Errors are for the token's bearer; ErrCannotVerify: that could not be found
	// out.
	Pod(ctx context.Context, token string, now time.Time) (Pod, error)
}

// ErrCannotVerify says that a token is neither good nor bad.
var ErrCannotVerify = errors.New("what the cluster's tokens are verified with cannot be had now")

// Cluster proves the nodes of one Kubernetes cluster. It is safe for concurrent
// use.
type Cluster struct {
	TrustDomain spiffeid.TrustDomain
	Name        string
	// Accounts are the service accounts whose pods are agents, "namespace:name".
	// Who can make a pod with one of these on a node is an agent there.
	Accounts []string
	Tokens   TokenVerifier
}

// Prove says on which node the bearer of token runs.
func (c *Cluster) Prove(ctx context.Context, token string, now time.Time) (*Node, error) {
	if token == "" || len(token) > maxK8sToken {
		return nil, refused(K8s, Malformed, "the token has %d bytes; want 1 to %d", len(token), maxK8sToken)
	}
	if strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return nil, refused(K8s, Malformed, "the token has characters that no token has: send the file's content without what is around it")
	}
	pod, err := c.Tokens.Pod(ctx, token, now)
	if errors.Is(err, ErrCannotVerify) {
		return nil, refused(K8s, Unavailable, "the token of cluster %s is not verified: %v", c.Name, err)
	}
	if err != nil {
		return nil, refused(K8s, Untrusted, "the token is not one of cluster %s for this CA: %v", c.Name, err)
	}
	if !slices.Contains(c.Accounts, pod.Namespace+":"+pod.Account) {
		return nil, refused(K8s, NotAllowed, "service account %.100q of namespace %.100q is not among the agents' (node_attestors.k8s.service_accounts)", pod.Account, pod.Namespace)
	}
	if pod.Name == "" || pod.UID == "" {
		return nil, refused(K8s, NotProved, "the token is bound to no pod: project it into the agent's pod (a serviceAccountToken volume)")
	}
	if pod.Node == "" || pod.NodeUID == "" {
		return nil, refused(K8s, NotProved, "the token does not name its pod's node: it does from Kubernetes 1.30 on, or with the feature ServiceAccountTokenPodNodeInfo")
	}
	id, err := entry.AttestedID(c.TrustDomain, K8s, c.Name, pod.NodeUID)
	if err != nil {
		return nil, refused(K8s, NotProved, "the UID of the node cannot be a name: %.100q", pod.NodeUID)
	}
	return &Node{ID: id, Kind: K8s, Selectors: c.facts(pod)}, nil
}

func (c *Cluster) facts(pod Pod) []entry.Selector {
	f := facts{kind: K8s}
	f.add("cluster", c.Name)
	f.add("node-name", pod.Node)
	f.add("node-uid", pod.NodeUID)
	f.add("namespace", pod.Namespace)
	f.add("service-account", pod.Account)
	f.add("pod-name", pod.Name)
	f.add("pod-uid", pod.UID)
	return f.list
}

// CheckCluster says why name cannot be that of a cluster: it is a segment of its
// agents' SPIFFE IDs.
func CheckCluster(td spiffeid.TrustDomain, name string) error {
	if _, err := entry.AttestedID(td, K8s, name, "x"); err != nil || len(name) > 64 {
		return fmt.Errorf("%q cannot be a path segment of a SPIFFE ID of at most 64 bytes", name)
	}
	return nil
}

// JWKS verifies tokens by the keys of the cluster's issuer.
type JWKS struct{ Source *oidc.Source }

// Pod implements TokenVerifier.
func (j JWKS) Pod(ctx context.Context, token string, now time.Time) (Pod, error) {
	claims, err := j.Source.Claims(ctx, token, now)
	if errors.Is(err, oidc.ErrUnavailable) {
		return Pod{}, fmt.Errorf("%w: %v", ErrCannotVerify, err)
	}
	if err != nil {
		return Pod{}, err
	}
	k8s := object(claims, "kubernetes.io")
	pod := Pod{
		Namespace: text(k8s, "namespace"), Account: text(object(k8s, "serviceaccount"), "name"),
		Name: text(object(k8s, "pod"), "name"), UID: text(object(k8s, "pod"), "uid"),
		Node: text(object(k8s, "node"), "name"), NodeUID: text(object(k8s, "node"), "uid"),
	}
	if claims["sub"] != accountPrefix+pod.Namespace+":"+pod.Account {
		return Pod{}, errors.New("its sub is not the service account that its other claims name")
	}
	return pod, nil
}

// object and text read claims; what is of another type is not there.
func object(claims map[string]any, name string) map[string]any {
	value, _ := claims[name].(map[string]any)
	return value
}

func text(claims map[string]any, name string) string {
	value, _ := claims[name].(string)
	return value
}

// account is the service account that a user name stands for.
func account(user string) (namespace, name string, ok bool) {
	rest, ok := strings.CutPrefix(user, accountPrefix)
	if !ok {
		return "", "", false
	}
	namespace, name, ok = strings.Cut(rest, ":")
	return namespace, name, ok && namespace != "" && name != "" && !strings.Contains(name, ":")
}
