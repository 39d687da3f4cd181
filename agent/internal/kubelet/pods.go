// What the kubelet says about a container, read from its list of pods.

package kubelet

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Container is one container of a pod on this node. It is immutable.
type Container struct {
	podUID string
	// Selectors are "type:value", sorted, each once.
	Selectors []string
}

// podList is what counts of a v1.PodList.
type podList struct {
	Kind  string `json:"kind"`
	Items []pod  `json:"items"`
}

type pod struct {
	Metadata struct {
		Name            string            `json:"name"`
		Namespace       string            `json:"namespace"`
		UID             string            `json:"uid"`
		Labels          map[string]string `json:"labels"`
		OwnerReferences []struct {
			Kind string `json:"kind"`
			Name string `json:"name"`
		} `json:"ownerReferences"`
	} `json:"metadata"`
	Spec struct {
		ServiceAccountName string `json:"serviceAccountName"`
		NodeName           string `json:"nodeName"`
	} `json:"spec"`
	Status struct {
		ContainerStatuses          []containerStatus `json:"containerStatuses"`
		InitContainerStatuses      []containerStatus `json:"initContainerStatuses"`
		EphemeralContainerStatuses []containerStatus `json:"ephemeralContainerStatuses"`
	} `json:"status"`
}

type containerStatus struct {
	Name        string `json:"name"`
	ContainerID string `json:"containerID"` // RUNTIME://ID; empty before it is made
	Image       string `json:"image"`
	ImageID     string `json:"imageID"`
}

// errTwice: an ID is of one container, and a list in which it is not is not one
// to believe.
var errTwice = errors.New("it lists a container twice")

// parse reads a list of pods, and returns the containers by their IDs.
func parse(body []byte) (map[string]Container, error) {
	var pods podList
	if err := json.Unmarshal(body, &pods); err != nil {
		return nil, fmt.Errorf("read the kubelet's list of pods: %w", err)
	}
	if pods.Kind != "PodList" {
		return nil, fmt.Errorf("read the kubelet's list of pods: it is a %.40q", pods.Kind)
	}
	containers := map[string]Container{}
	for i := range pods.Items {
		p := &pods.Items[i]
		if p.Metadata.UID == "" {
			continue
		}
		of := p.selectors()
		for _, status := range slices.Concat(p.Status.ContainerStatuses, p.Status.InitContainerStatuses, p.Status.EphemeralContainerStatuses) {
			_, id, ok := strings.Cut(status.ContainerID, "://")
			if !ok || id == "" {
				continue
			}
			if _, known := containers[id]; known {
				return nil, fmt.Errorf("read the kubelet's list of pods: %w: %.80q", errTwice, id)
			}
			selectors := append(status.selectors(), of...)
			slices.Sort(selectors)
			containers[id] = Container{podUID: p.Metadata.UID, Selectors: slices.Compact(selectors)}
		}
	}
	return containers, nil
}

// selectors are those of every container of the pod.
func (p *pod) selectors() (s []string) {
	s = fact(s, "ns", p.Metadata.Namespace)
	s = fact(s, "sa", p.Spec.ServiceAccountName)
	s = fact(s, "pod-name", p.Metadata.Name)
	s = fact(s, "node-name", p.Spec.NodeName)
	for key, value := range p.Metadata.Labels {
		// A value may be empty; a key may not, and has no colon to part it from
		// the value at another place.
		if key != "" && !strings.Contains(key, ":") {
			s = fact(s, "pod-label", key+":"+value)
		}
	}
	for _, owner := range p.Metadata.OwnerReferences {
		if owner.Kind != "" && owner.Name != "" && !strings.Contains(owner.Kind, ":") {
			s = fact(s, "pod-owner", owner.Kind+":"+owner.Name)
		}
	}
	return s
}

// selectors are the container's own. An image has the name that it was asked for
// by, and the one with its digest.
func (c *containerStatus) selectors() (s []string) {
	s = fact(s, "container-name", c.Name)
	s = fact(s, "container-image", c.Image)
	return fact(s, "container-image", c.ImageID)
}

// maxFactBytes is more than Kubernetes allows any of them.
const maxFactBytes = 1024

// fact adds a selector, if the value can be one.
func fact(s []string, name, value string) []string {
	if value == "" || len(value) > maxFactBytes || strings.ContainsFunc(value, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return s
	}
	return append(s, "k8s:"+name+":"+value)
}
