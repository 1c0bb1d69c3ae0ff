// SPDX-License-Identifier: Apache-2.0

// Package config reads the configuration file. It knows of each key its name and its kind, and tells where in
// the file a value stands; what values mean is not its business.
package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Kind is what the value of a key looks like.
type Kind int

// The kinds. A list may also be written as a single text.
const (
	Text   Kind = iota
	Number      // 5
	Switch      // true or false
	List        // [a, b]
	Pairs       // {a: b}
)

func (k Kind) String() string {
	switch k {
	case Number:
		return "a whole number"
	case Switch:
		return "true or false"
	case List:
		return "a list"
	case Pairs:
		return "pairs of name and value"
	}
	return "a text"
}

// Key is one that the file may have.
type Key struct {
	Name string
	Kind Kind
}

// Value is what a key has.
type Value struct {
	Words []string // of pairs: "name=value"
	Line  int      // where it stands in the file; 0: not in a file
}

// Error is something wrong with a file.
type Error struct {
	File    string
	Line    int
	Key     string // empty: the file itself is wrong, and nothing of it was read
	Problem string
}

func (e *Error) Error() string {
	where := e.File
	if e.Line > 0 {
		where += ":" + strconv.Itoa(e.Line)
	}
	if e.Key != "" {
		where += ": " + e.Key
	}
	return where + ": " + e.Problem
}

// Parse reads a file. What is wrong with single keys is joined as *[Error]s, and the others are returned
// with it. Near finds the names nearest to one that is unknown.
func Parse(file string, raw []byte, keys []Key, near func(name string, names []string) []string) (map[string]Value, error) {
	var doc, more yaml.Node
	out := make(map[string]Value)
	docs := yaml.NewDecoder(bytes.NewReader(raw))
	if err := docs.Decode(&doc); errors.Is(err, io.EOF) {
		return out, nil
	} else if err != nil {
		return nil, syntax(file, err)
	}
	if err := docs.Decode(&more); err == nil {
		return nil, &Error{File: file, Line: more.Line, Problem: "a second YAML document; put all keys into the first"}
	} else if !errors.Is(err, io.EOF) {
		return nil, syntax(file, err)
	}
	if len(doc.Content) == 0 {
		return out, nil
	}
	top := doc.Content[0]
	if top.Kind == yaml.ScalarNode && top.Tag == "!!null" {
		return out, nil
	}
	if top.Kind != yaml.MappingNode {
		return nil, &Error{File: file, Line: top.Line, Problem: "want lines of KEY: VALUE"}
	}
	var names []string
	for _, k := range keys {
		names = append(names, k.Name)
	}
	var errs []error
	for i := 0; i+1 < len(top.Content); i += 2 {
		key, value := top.Content[i], top.Content[i+1]
		at := slices.Index(names, key.Value)
		var words []string
		var problem string
		if have, twice := out[key.Value]; at < 0 {
			problem = "no such key; the nearest are " + strings.Join(near(key.Value, names), ", ")
		} else if twice {
			problem = fmt.Sprintf("a second time; the first is in line %d", have.Line)
		} else {
			words, problem = read(value, keys[at].Kind)
		}
		if problem != "" {
			errs = append(errs, &Error{File: file, Line: cmp.Or(key.Line, value.Line), Key: key.Value, Problem: problem})
			continue
		}
		out[key.Value] = Value{Words: words, Line: key.Line}
	}
	return out, errors.Join(errs...)
}

// syntax takes the line out of an error of the YAML parser.
func syntax(file string, err error) error {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	e := &Error{File: file, Problem: "no YAML: " + text}
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		number, problem, _ := strings.Cut(rest, ": ")
		if n, err := strconv.Atoi(number); err == nil {
			e.Line, e.Problem = n, "no YAML: "+problem
		}
	}
	return e
}

// read turns a value into words, or says what is wrong with it.
func read(n *yaml.Node, kind Kind) (words []string, problem string) {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	want := "want " + kind.String() + ", have " + describe(n)
	switch kind {
	case List:
		if n.Kind == yaml.ScalarNode {
			return scalar(n, want)
		}
		if n.Kind != yaml.SequenceNode {
			return nil, want
		}
		for _, c := range n.Content {
			w, bad := scalar(c, "in a list, want texts, have "+describe(c))
			if bad != "" {
				return nil, bad
			}
			words = append(words, w...)
		}
		return words, ""
	case Pairs:
		if n.Kind != yaml.MappingNode {
			return nil, want
		}
		lines := make(map[string]int)
		for i := 0; i+1 < len(n.Content); i += 2 {
			name := n.Content[i]
			if first, twice := lines[name.Value]; twice {
				return nil, fmt.Sprintf("%s a second time; the first is in line %d", name.Value, first)
			}
			lines[name.Value] = name.Line
			w, bad := scalar(n.Content[i+1], "behind "+n.Content[i].Value+", want a text, have "+describe(n.Content[i+1]))
			if bad != "" {
				return nil, bad
			}
			words = append(words, n.Content[i].Value+"="+w[0])
		}
		return words, ""
	}
	words, problem = scalar(n, want)
	if problem == "" && Check(kind, words[0]) != nil {
		return nil, want
	}
	return words, problem
}

func scalar(n *yaml.Node, want string) ([]string, string) {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if n.Kind != yaml.ScalarNode || n.Tag == "!!null" {
		return nil, want
	}
	return []string{n.Value}, ""
}

func describe(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case n.Kind == yaml.MappingNode:
		return "pairs of name and value"
	case n.Tag == "!!null":
		return "nothing"
	}
	return strconv.Quote(n.Value)
}

// Check says whether one word is of its kind.
func Check(kind Kind, word string) error {
	var err error
	switch kind {
	case Number:
		_, err = strconv.Atoi(word)
	case Switch:
		if word != "true" && word != "false" {
			err = errors.New("neither")
		}
	case Pairs:
		if !strings.Contains(word, "=") {
			return fmt.Errorf("want NAME=VALUE, have %q", word)
		}
	}
	if err != nil {
		return fmt.Errorf("want %s, have %q", kind, word)
	}
	return nil
}

// Variable is the environment's name for a key.
func Variable(key string) string {
	return "BPFNET_" + strings.ToUpper(strings.ReplaceAll(key, "-", "_"))
}

// ParseVariable reads a variable's text; lists and pairs have commas between.
func ParseVariable(kind Kind, text string) ([]string, error) {
	words := []string{text}
	if kind == List || kind == Pairs {
		words = nil
		for w := range strings.SplitSeq(text, ",") {
			if w = strings.TrimSpace(w); w != "" {
				words = append(words, w)
			}
		}
	}
	for _, w := range words {
		if err := Check(kind, w); err != nil {
			return nil, err
		}
	}
	return words, nil
}
