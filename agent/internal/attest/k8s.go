// Kubernetes: the service-account token that the cluster projects into the agent's
// pod, and renews there.

package attest

import (
	"context"
	"crypto/tls"
	"fmt"
	"strings"

	"merlon.dev/ca/capb"
)

const maxK8sToken = 16 << 10 // what the CA takes

// K8s shows the token of the agent's pod.
type K8s struct {
	// Cluster is the name that the CA has for the cluster.
	Cluster string
	// TokenFile is where the token is projected. It is read at each try: the
	// cluster renews it.
	TokenFile string
}

// Kind implements Attestor.
func (*K8s) Kind() string { return "k8s" }

// Evidence implements Attestor.
func (k *K8s) Evidence(_ context.Context, _ tls.ConnectionState, req *capb.AttestRequest) error {
	data, err := readFile("the pod's service-account token", k.TokenFile, maxK8sToken)
	if err != nil {
		return fmt.Errorf("%w: project one with the audience that the CA expects (a serviceAccountToken volume) to k8s_token_file", err)
	}
	token := strings.TrimSpace(string(data))
	if token == "" {
		return fmt.Errorf("%w: %s is empty", ErrNone, k.TokenFile)
	}
	req.Evidence = &capb.AttestRequest_K8S{K8S: &capb.K8SToken{Cluster: k.Cluster, Token: token}}
	return nil
}

// Advice implements Attestor.
func (k *K8s) Advice() string {
	return "compare the token in " + k.TokenFile + " with node_attestors.k8s of the CA: cluster, audience, service account"
}
