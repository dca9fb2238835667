"""Slow reference for which tokens of a batch count in a pass over features, one position at a time."""

IMAGE, INSTRUCTION, ANSWER = "image", "instruction", "answer"


def kind_of(token, label, image_token):
    """Kind of one real token: a picture's patch, a token that carries loss, or anything else."""
    if token == image_token:
        return IMAGE
    return INSTRUCTION if label == -100 else ANSWER


def positions_by_kind(input_ids, labels, attention_mask, image_token):
    """For every sample, kind -> positions of its real tokens in order; padding is of no kind."""
    samples = []
    for row in range(len(input_ids)):
        positions = {IMAGE: [], INSTRUCTION: [], ANSWER: []}
        for place in range(len(input_ids[row])):
            if attention_mask[row][place] == 1:
                positions[kind_of(input_ids[row][place], labels[row][place], image_token)].append(place)
        samples.append(positions)
    return samples


def num_chosen(positions, budgets):
    """Tokens of one sample that count: of a kind with a budget at most so many, of any other kind all."""
    total = 0
    for kind, places in positions.items():
        total += min(len(places), budgets[kind]) if kind in budgets else len(places)
    return total


def is_evenly_spaced(chosen, available):
    """Whether positions picked out of the available ones lie as far apart as others, give or take one."""
    places = [available.index(position) for position in chosen]
    gaps = [places[i + 1] - places[i] for i in range(len(places) - 1)]
    return places == sorted(set(places)) and (not gaps or max(gaps) - min(gaps) <= 1)
