// Selectors of SPIRE's attestors, and what proves the same here.

package spire

import (
	"fmt"
	"slices"
	"strings"

	"merlon.dev/ca/internal/entry"
)

// same are the selectors of workloads that mean the same under the same name.
var same = map[string][]string{
	"unix": {"uid", "gid", "user", "group", "supplementary_gid", "supplementary_group", "path", "sha256"},
	"k8s":  {"ns", "sa", "pod-name", "pod-uid", "pod-label", "pod-owner", "node-name", "container-name", "container-image"},
}

// workloadSelector is what sel of a workload is here. The error says why it is nothing.
func workloadSelector(sel entry.Selector) ([]entry.Selector, error) {
	key, value, _ := strings.Cut(sel.Value, ":")
	switch {
	case slices.Contains(same[sel.Type], key):
		return []entry.Selector{sel}, nil
	case sel.Type == "systemd" && key == "id":
		return []entry.Selector{{Type: "systemd", Value: "unit:" + value}}, nil
	case sel.Type == "docker":
		return nil, fmt.Errorf("selector %s: nobody asks Docker here, so labels, variables and images of containers are not proved; choose unix:path and unix:user, systemd:unit, or container:id", sel)
	case sel.Type == "spiffe_id":
		return nil, fmt.Errorf("selector %s: an entry for what has another SPIFFE ID does not exist here", sel)
	}
	return nil, fmt.Errorf("selector %s: nothing here proves that; agent/README.md lists what is proved about a process", sel)
}

// nodeSelectors are the facts about nodes, by SPIRE's type and the beginning of its
// value.
var nodeSelectors = map[string]map[string]string{
	"x509pop": {"subject:cn:": "x509pop:subject-cn:"},
	"k8s_psat": {
		"cluster:": "k8s:cluster:", "agent_ns:": "k8s:namespace:", "agent_sa:": "k8s:service-account:",
		"agent_pod_name:": "k8s:pod-name:", "agent_pod_uid:": "k8s:pod-uid:",
		"agent_node_name:": "k8s:node-name:", "agent_node_uid:": "k8s:node-uid:",
	},
	"aws_iid": {
		"account_id:": "aws:account:", "region:": "aws:region:", "az:": "aws:zone:",
		"instance:id:": "aws:instance-id:", "image:id:": "aws:image-id:",
	},
	"gcp_iit": {
		"project-id:": "gcp:project:", "zone:": "gcp:zone:", "instance-name:": "gcp:instance-name:", "sa:": "gcp:service-account:",
	},
	"azure_msi": {"subscription-id:": "azure:subscription:"},
}

// nodeSelector is what sel of a node is here.
func nodeSelector(sel entry.Selector) ([]entry.Selector, error) {
	if rest, ok := strings.CutPrefix(sel.Value, "vm-name:"); ok && sel.Type == "azure_msi" {
		group, name, ok := strings.Cut(rest, ":")
		if !ok {
			return nil, fmt.Errorf("selector %s: want azure_msi:vm-name:GROUP:NAME", sel)
		}
		return []entry.Selector{
			{Type: "azure", Value: "resource-group:" + strings.ToLower(group)},
			{Type: "azure", Value: "vm-name:" + strings.ToLower(name)},
		}, nil
	}
	for prefix, ours := range nodeSelectors[sel.Type] {
		rest, ok := strings.CutPrefix(sel.Value, prefix)
		if !ok {
			continue
		}
		typ, key, _ := strings.Cut(ours, ":")
		if typ == "azure" {
			rest = strings.ToLower(rest)
		}
		return []entry.Selector{{Type: typ, Value: key + rest}}, nil
	}
	return nil, fmt.Errorf("selector %s: nothing here proves that of a node; ca/README.md, Nodes, lists what is", sel)
}

// translateAll translates each by one: all of them, or the first reason why not.
func translateAll(selectors []entry.Selector, one func(entry.Selector) ([]entry.Selector, error)) ([]entry.Selector, error) {
	var out []entry.Selector
	for _, sel := range selectors {
		ours, err := one(sel)
		if err != nil {
			return nil, err
		}
		out = append(out, ours...)
	}
	return out, nil
}
